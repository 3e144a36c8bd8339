"""The output of `status`. ``status_view.py`` puts it together: the table of nodes and GPUs (``rows.py``,
``columns.py``), the remarks below it, the line of the whole pool, and the processes. Text from hosts is cleaned here.
"""
