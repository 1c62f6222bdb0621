"""Edits of a model: slots go in and come out, their weights are filled, baked, extracted."""
