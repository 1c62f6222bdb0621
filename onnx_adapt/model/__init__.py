"""A model on disk and in memory: the wire format, large tensors, where files go."""
