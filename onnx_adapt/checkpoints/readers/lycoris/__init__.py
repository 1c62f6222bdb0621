"""The methods of LyCORIS and sd-scripts: what the tensors of one module ask for."""
