"""Draws the output of `status`: the table of nodes and GPUs, the remarks, the line of the pool, the processes.

``status_view.py`` puts the parts together. The table is in ``rows.py`` and ``columns.py``. Text from hosts is cleaned
here.
"""
