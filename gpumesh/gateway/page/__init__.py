"""The web page at /ui for people: its file, its stream of events, and the routes that only it needs.

The page's own files are in ``gpumesh/gateway/static``. Nothing here answers a client of a model.
"""
