"""Measuring a mesh in the field's own terms: what to send (``scenarios``), sending it (``load``), what came of it
(``stats``, ``summary``), and how that is kept and shown (``result``, ``report``, ``compare``).

Deciding and computing are pure; only ``load``, ``gpu_meter`` and ``result`` touch a network, a clock or a disk. What
may not enter: rich, typer, the daemon. The load goes through whatever ``load.Chat`` is given.
"""
