"""The interface of tunnels to this machine: child processes, local commands, sockets, users of connections, network
changes.

No file here depends on a remote host or on a transport.
"""
