"""The control socket, through which other processes reach a running mesh: protocol, server and clients.

``messages.py`` is the protocol, ``framing.py`` its lines. ``server.py`` answers the requests of two clients:
``remote_session.py`` and ``quick_status.py``. ``client_errors.py`` has the errors of both clients.
"""
