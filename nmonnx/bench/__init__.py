"""How fast one model is beside another: paired rounds, where the time goes, weights read, load time and memory."""
