"""A member's host: which programs and models it has, what it offers, and the programs of a pool that run there.

All that a host sends is hostile until parsed. What goes where is decided in ``planning``; when something starts and
ends, in ``running``.
"""
