"""The methods of PEFT: what the tensors of one module ask for, method by method."""
