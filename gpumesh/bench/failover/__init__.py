"""Takes a node out of service in a stage of ``failover``, watches what the mesh sees, and asks for answers again.

What is computed from it is in ``figures/``.
"""
