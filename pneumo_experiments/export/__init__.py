"""Other forms of a model: ONNX."""
