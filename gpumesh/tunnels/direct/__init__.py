"""Nodes without SSH: their URLs are used as they are."""
