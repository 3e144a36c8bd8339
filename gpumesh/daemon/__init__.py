"""A mesh that other processes can talk to: where its files are, its lock, its control socket, its log, and how it is
sent to the background. Whatever can be asked of a mesh is the ``Session`` protocol, and looks the same whether the mesh
runs in this process (``LocalSession``) or behind the socket (``RemoteSession``).

No tables, no options, no wording for people here: that is cli/. Nothing that ``status`` needs may import pydantic,
paramiko, httpx or aiohttp when it is imported.
"""
