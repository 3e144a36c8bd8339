"""The benchmark of a mesh: TTFT, TPOT, throughput, goodput, scaling, overhead, failover; results, reports, comparisons.

``scenarios`` plans the requests, ``load`` sends them, ``stats`` and ``summary`` compute the figures. ``result``,
``result_journal``, ``result_folder``, ``report`` and ``compare`` keep and show the result. ``simulate/`` runs the
balancer against simulated servers, without a mesh.

Planning and computing are pure. Only ``load``, ``routes``, ``gpu_meter``, ``result_journal`` and ``result_folder`` use
a network, a clock or a disk. Not allowed here: rich, typer, the daemon. ``load`` sends through the ``SendPrompt`` that
its caller gives.
"""
