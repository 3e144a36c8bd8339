"""Which node gets a request. Pure: snapshots in, decisions out; clock and randomness are parameters."""
