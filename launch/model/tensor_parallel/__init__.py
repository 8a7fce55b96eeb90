"""How a model is split over tensor-parallel ranks: transformers' plan for it, as DeepSpeed's layer specs."""
