"""Training adapters on nothing but an ONNX model: losses, steps, optimisers, the loop."""
