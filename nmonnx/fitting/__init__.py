"""Finds the constants that make up for pruning, and keeps those that help on tokens held out."""
