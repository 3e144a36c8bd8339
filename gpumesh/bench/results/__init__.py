"""The result of a run as values, as JSON."""
