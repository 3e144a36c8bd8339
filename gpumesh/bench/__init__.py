"""The benchmark of a mesh, in the field's terms: plan the requests (``scenarios``), send them (``load``), compute the
figures (``stats``, ``summary``), keep and show the result (``result``, ``result_folder``, ``report``, ``compare``).

Planning and computing are pure. Only ``load``, ``routes``, ``gpu_meter`` and ``result_folder`` use a network, a clock
or a disk. Not allowed here: rich, typer, the daemon. ``load`` sends through the ``SendPrompt`` that it is given.
"""
