"""What tunnels ask of this machine: child processes, Unix sockets, users of connections, changes of the network.

Nothing here knows a remote host.
"""
