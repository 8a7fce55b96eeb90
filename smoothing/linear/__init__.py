"""The fused head: loss and gradients from hidden states, the logits computed one chunk at a time and never kept."""
