"""Chooses the node for a request. Pure: snapshots in, decisions out; clock and randomness are parameters."""
