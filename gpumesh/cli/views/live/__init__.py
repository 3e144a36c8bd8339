"""What stays on the terminal and is redrawn: the live table of `up` and `status --watch`, and the table of `demo`.

``screen.py`` is the terminal itself, ``key_selection.py`` what keys mean, ``node_actions.py`` what they do to nodes.
"""
