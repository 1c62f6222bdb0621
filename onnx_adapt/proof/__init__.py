"""Proving in ONNX Runtime that a model is its base plus exactly its slots."""
