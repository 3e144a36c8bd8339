"""A process for each connection, and the pool that forks it. Only the worker's end knows transports."""
