"""What a recipe asks for, and the constants of every prune that follow from it."""
