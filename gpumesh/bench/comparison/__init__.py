"""Compares results."""
