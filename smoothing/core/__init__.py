"""What every loss shares: its options and arguments, the mathematics of a shard, and what ranks exchange."""
