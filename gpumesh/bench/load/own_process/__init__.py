"""The load generator in a process of its own: the process, its messages, and the link to it."""
