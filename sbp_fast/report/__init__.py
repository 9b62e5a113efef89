"""Reports for people: text tables and plots."""
