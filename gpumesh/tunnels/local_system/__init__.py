"""What tunnels need of this machine: child processes, local commands, sockets, users of connections, network changes.

Nothing here knows a remote host or a transport.
"""
