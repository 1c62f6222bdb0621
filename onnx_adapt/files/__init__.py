"""A model's file on disk: the wire format, weights left where they are, whole files."""
