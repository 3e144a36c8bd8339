"""The command line: what a person types and sees.

``commands/`` has one file for each command. Commands are written against the protocol ``Session``, so it makes no
difference whether the mesh runs in this process or in the background. ``views/`` draws; only views know rich, and they
clean what comes from hosts. ``init/``, ``bench/`` and ``chat/`` hold the larger parts of these commands.

A command's module is imported when the command runs, and imports heavy modules inside its functions: the time until
`--help` and `status` answer is part of the product.
"""
