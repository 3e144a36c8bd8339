"""The notes that qualify figures."""
