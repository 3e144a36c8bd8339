"""Transport ``sshtunnel``: paramiko in the worker's own process.

opening.py makes the connection, with handshake.py and authentication.py. sshtunnel_connector.py says what sshtunnel
does and what we replaced. channel_multiplexer.py and channel_relay.py forward. sessions.py runs commands.
"""
