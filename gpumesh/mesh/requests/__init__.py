"""One request on its way: its attempts on nodes, its answer, and its continuation where a node was lost."""
