"""A read-only index of a model's graphs, and what can be read off it."""
