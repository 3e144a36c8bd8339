"""The continuation of a cut stream on another server, for each form of stream. Pure: bytes in, bytes out.

This room has no sockets and no clocks, and does not choose the server that continues.
"""
