"""Edits of a model: insert and remove slots; fill, bake and extract their weights."""
