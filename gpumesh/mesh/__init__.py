"""The running whole: nodes with their tunnels and probes, who gets which request, and what becomes of it. No HTTP
server, no terminal: the gateway and the command line stand on it, and so may any program (``gpumesh.Mesh``)."""
