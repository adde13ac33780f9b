"""The ONNX file: read without its weights, checked, edited as a graph, woven back and written."""
