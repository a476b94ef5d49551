"""Inference on top of the engine: optimisers, chi-square problems, reconstruction."""
