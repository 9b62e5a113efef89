"""Models that a step must leave unharmed: one builder per architecture, small and seeded."""
