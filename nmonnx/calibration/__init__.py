"""Runs the original model over a text to see what its layers read, and which of them are sensitive."""
