"""What a checkpoint asks for -> slots with weights in one graph."""
