"""Trained checkpoints: what training libraries save, as slots and weights for a graph."""
