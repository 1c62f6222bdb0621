"""Find the calls of a checkpoint's modules in a graph, by names or by values."""
