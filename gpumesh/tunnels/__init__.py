"""How a node is reached. The only room with threads (blocking.py, forwarder.py) and, beside the lab, with paramiko.

The mesh's process has a ``Tunnel`` for each node (asyncio). For an SSH node, the supervisor owns the listening sockets
and a *worker process*, which connects, forwards and runs commands. A worker that dies takes one connection with it,
never the mesh, and the listening ports stay. docs/internals/tunnels.md has the facts behind this design.

What all transports share is in this folder. Sub-rooms: ``workers`` (the processes), ``openssh`` and ``inprocess`` (the
transports), ``direct`` (nodes without SSH), ``local_system`` (what is asked of this machine). transports.py alone knows
which transport a kind means.
"""
