"""How a stream that was cut is continued on another server, for each form of stream. Pure: bytes in, bytes out.

No sockets, no clocks, and no choice of the server that continues.
"""
