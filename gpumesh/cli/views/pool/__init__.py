"""The views of `gpumesh pool`: a plan, the states of pools, and the progress of a start.

Texts may come from hosts and models: each view makes them safe.
"""
