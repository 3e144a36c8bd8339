"""A mesh that other processes can reach: its process in the foreground or the background, its lock, its files, its log,
and its control socket.

``Session`` (in ``sessions/``) is what can be asked of a mesh. It looks the same whether the mesh runs in this process
(``LocalSession``) or behind the socket (``RemoteSession``).

No tables, no options and no wording for people are here: they belong to cli/. Nothing that ``status`` needs may import
pydantic, paramiko, httpx or aiohttp when it is imported.
"""
