"""Inspections: checks of a node that cost too much for a probe every two seconds.

An inspection probes each route to the node's server by itself, and asks for the free disk space. Inspections run at
regular intervals while a mesh runs, and at once for `gpumesh audit`.
"""
