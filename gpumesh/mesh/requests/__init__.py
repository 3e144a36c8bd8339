"""The delivery of one request: its attempts on nodes, its answer, and the continuation when a node is lost."""
