"""A mesh that other processes can reach: its process (`up`, `up -d`), its lock, files and log, its control socket.

``Session`` (in ``sessions/``) has the operations of a mesh. They are the same whether the mesh runs in this process
(``LocalSession``) or behind the socket (``RemoteSession``).

Tables, options and texts for people belong to cli/, not here. A module that ``status`` needs may not import pydantic,
paramiko or httpx when it is imported.
"""
