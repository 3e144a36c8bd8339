"""The entry point of the program `gpumesh`: runs the command line, and exits quietly after Ctrl-C.

Importing the command line takes a tenth of a second, and Ctrl-C must not show a traceback in that time either. So
nothing is imported before ``main`` runs.
"""

from __future__ import annotations

import gc
import sys

COLLECT_AFTER = 30_000  # new objects between two garbage collections; Python's own 700 are for little memory


def main() -> None:
    """Runs the command line, and ends the process with its exit code."""
    # Most objects of a command are its modules, which stay in memory. While modules are imported, the garbage collector
    # would scan them again and again. That takes a twelfth of the time of a short command.
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])
    try:
        from gpumesh.cli.root_command import run_app

        run_app()
    except KeyboardInterrupt:
        sys.exit(130)
