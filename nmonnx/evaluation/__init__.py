"""How much a model loses: perplexity, tasks, agreement with the dense model, phases."""
