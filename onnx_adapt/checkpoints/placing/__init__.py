"""Place the edits of a checkpoint in a graph, as slots with weights."""
