"""Reads a mesh.yaml: its text becomes a ``Topology`` in steps (YAML, variables, rules between keys, schema, specs).

``reader`` calls these steps in this order. Each step reports all problems that it finds. Not allowed here: the network.
"""
