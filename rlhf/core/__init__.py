"""The shared policy-optimization core: pure functions on tensors, for gym agents and language models alike."""
