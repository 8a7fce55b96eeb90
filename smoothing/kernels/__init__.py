"""Everything that reads a shard's logits: as Triton kernels and as torch operations, behind one interface."""
