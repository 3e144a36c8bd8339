"""The answer of a result in sentences."""
