"""One node while the mesh runs: its tunnel, its probes, what is in flight on it, and its snapshot."""
