"""A slot: its record, its parts, the formula as nodes and in float64."""
