"""Transport ``sshtunnel``: paramiko in the worker's own process."""
