"""Decides which stages a benchmark runs, with a file for each scenario. Pure."""
