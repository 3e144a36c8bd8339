"""How a node is reached. The only room with threads (blocking.py, forwarder.py) and, beside the lab, with paramiko.

The mesh's process holds a ``Supervisor`` for each node (asyncio). For SSH nodes that supervisor owns the listening
sockets and a *worker process*, which connects, forwards and runs commands; a worker that dies takes one
connection with it, never the mesh, and the listening ports stay.
"""
