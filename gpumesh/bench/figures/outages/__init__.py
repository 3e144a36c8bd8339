"""What clients notice of a node that goes away."""
