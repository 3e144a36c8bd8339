"""Takes over changes of mesh.yaml while its mesh runs.

``reloader.py`` carries a reload out, ``file_follower.py`` decides when the file is read, and ``hangup.py`` has the
signal. What changes is decided in ``config/live_changes.py`` and ``mesh/nodes/node_changes.py``.
"""
