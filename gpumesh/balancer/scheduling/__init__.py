"""Places each request on a node, or lets it wait: the ``Scheduler`` and its parts. Pure."""
