"""Access to this machine for tunnels: child processes, commands, sockets, users of connections, network changes.

No file here depends on a remote host or on a transport.
"""
