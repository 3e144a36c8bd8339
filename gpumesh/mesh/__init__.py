"""A running mesh: its nodes, which of them gets a request, and how the answer comes back.

No HTTP server and no terminal: the gateway and the command line use this room, and so may any program
(``gpumesh.Mesh``).
"""
