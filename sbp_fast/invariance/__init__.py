"""What makes a step the same at any micro-batch size."""
