"""The fused head: logits a chunk at a time, gradients summed on the way."""
