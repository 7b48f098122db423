"""Training: configuration, the step, the loop and its records."""
