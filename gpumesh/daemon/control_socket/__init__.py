"""The control socket, through which other processes reach a running mesh: protocol, server and clients.

``messages.py`` is the protocol, ``framing.py`` its lines. ``server.py`` answers, ``remote_session.py`` and
``quick_status.py`` ask.
"""
