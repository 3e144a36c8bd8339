"""The worker processes, one for each connection, and the pool that forks them. Only worker.py uses the transports."""
