"""An adapter: weights for the slots of a model, in memory and as a file."""
