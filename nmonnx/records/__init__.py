"""What was measured or fitted on one model, as files: statistics, sensitivity, gradients, corrections."""
