"""Tunnels: the mesh's routes to its nodes, by SSH or direct. Only this room makes threads (blocking.py, forwarder.py).

Only this room and the lab use paramiko. The mesh's process has a ``Tunnel`` for each node (asyncio). For an SSH node,
the supervisor owns the listening sockets and a *worker process*, which connects, forwards and runs commands. A worker
that dies takes one connection with it, never the mesh, and the listening ports stay. docs/internals/tunnels.md has the
facts behind this design.

This folder holds the code that all transports share. Its sub-rooms are ``workers`` (the processes), ``openssh`` and
``inprocess`` (the transports), ``direct`` (nodes without SSH), and ``local_system`` (queries to this machine). Only
transports.py maps a kind of transport to its code.
"""
