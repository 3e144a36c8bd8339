"""Outages that somebody asks for, to measure what they do: a node is taken out of service while it is held."""
