"""Runs a language model with ONNX Runtime: tokens in, logits out, its cache in between."""
