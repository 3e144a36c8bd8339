"""Computes figures from records: statistics, a stage, the use of the GPUs."""
