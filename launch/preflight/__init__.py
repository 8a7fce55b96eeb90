"""`--sanity`: check a run on one device before it is started on many."""
