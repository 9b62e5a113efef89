"""The ways through a large batch: one micro-batch after the other, all together, or twice."""
