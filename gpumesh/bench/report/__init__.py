"""The report of a result: one HTML file with plots."""
