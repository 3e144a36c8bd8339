"""What a person types and sees: one file for each command, written against ``daemon.session.Session`` so that it makes
no difference whether the mesh runs in this process or in the background. Only render, status_view, live
and scene know rich, and what a host said is cleaned in them.

Modules of commands are imported only when their command is run, and import what is heavy inside their functions: the
time to `--help` and to `status` is part of the product.
"""
