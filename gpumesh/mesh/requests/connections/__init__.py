"""Keep-alive connections to the servers of nodes, and the parser of what the servers answer."""
