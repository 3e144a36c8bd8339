"""Writes files as a whole or not at all, and locks them between processes."""
