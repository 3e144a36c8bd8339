"""The delivery of one request: its attempts on nodes, its answer, and the continuation after a node is lost."""
