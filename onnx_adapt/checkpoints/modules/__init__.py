"""Names and values -> the calls of a module in a graph."""
