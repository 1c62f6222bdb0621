"""Trained checkpoints of PEFT and AdapterHub, as slots and weights for a graph."""
