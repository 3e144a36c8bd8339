"""The models of all nodes: which there are, which would fit into memory, and what changes a node's model store."""
