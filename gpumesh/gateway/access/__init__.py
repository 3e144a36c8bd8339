"""Who sends a request, and whether the gateway answers it: the checks of Host, Origin and key, and the client's name.

Not allowed here: routes, the mesh, and the content of bodies.
"""
