"""Turn the slots of a graph back into edits, by modules of PyTorch."""
