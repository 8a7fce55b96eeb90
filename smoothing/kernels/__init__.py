"""The passes over a shard's logits: Triton kernels, and the same in torch operations."""
