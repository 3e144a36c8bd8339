"""The body of a request: where it ends, how it is unpacked, and how much memory all bodies may hold together."""
