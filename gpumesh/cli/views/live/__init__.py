"""Views that stay on the terminal and are redrawn: the live table of `up` and `status --watch`, the table of `demo`.

``screen.py`` is the terminal itself. ``key_selection.py`` knows the meaning of keys, and ``node_actions.py`` carries
out the actions on nodes.
"""
