"""A running mesh: its nodes, the choice of a node for each request, and the answer's path back to the client.

The package has no HTTP server and no terminal. The gateway and the command line use it, and so can any other program
(``gpumesh.Mesh``).
"""
