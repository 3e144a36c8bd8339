"""The view of `gpumesh describe`: the facts of one node, and how they are drawn."""
