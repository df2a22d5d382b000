"""The model: given tensors and weights, what comes out? Torch lives here; no URI, no clock, no Ray."""
