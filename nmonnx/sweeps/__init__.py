"""Many recipes of one model measured side by side, on one machine or several."""
