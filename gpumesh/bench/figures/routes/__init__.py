"""What the ways to a node cost, and how they differ."""
