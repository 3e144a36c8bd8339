"""Durable batches: many requests of a file, which the mesh works on in its gaps and which outlive every process.

``values.py`` has the values. ``base.py`` has the interfaces: ``BatchStore``, where files, batches, requests and results
are kept, and ``Sender``, which sends one request through the mesh. ``engine.py`` takes requests out of a store, sends
them and records their results. Nothing here knows HTTP servers, tables or terminals.
"""
