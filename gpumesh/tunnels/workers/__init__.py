"""A process for each connection, and the pool that forks it. worker.py, alone in this room, uses the transports."""
