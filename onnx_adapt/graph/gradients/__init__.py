"""The gradient of a graph as more ONNX nodes: reverse mode, one rule for each operator."""
