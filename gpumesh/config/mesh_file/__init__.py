"""Reads a mesh.yaml: from its text to a ``Topology``, by way of YAML, variables, schema, rules between keys, and specs.

``reader`` calls these steps in this order. Each step reports all problems that it finds. Not allowed here: the network.
"""
