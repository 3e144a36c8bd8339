"""Draws batches: a table of all, and all that is known of one, also while it goes on."""
