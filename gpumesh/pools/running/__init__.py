"""Runs pools: decides when one starts (``lifecycle.py``), starts and watches all its parts as one, and plans it anew.

What runs on the hosts, and how it is guarded, is in ``pools/hosts/``; what goes where, in ``pools/planning/``.
"""
