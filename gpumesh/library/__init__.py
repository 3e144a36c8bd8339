"""The mesh for Python programs: ``gpumesh.connect`` and all that it returns. No tables, no terminal, no HTTP server.

Each request goes to a gateway: that of the running mesh, or one at a private Unix socket in this process. So a program
gets the same failover, continuation, keys and accounting as any other client.
"""
