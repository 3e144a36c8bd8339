"""The entry point of the program `gpumesh`: runs the command line, and exits quietly after Ctrl-C.

Importing the command line takes a tenth of a second, and Ctrl-C must not show a traceback in that time either. So
nothing is imported before ``main`` runs.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line, and ends the process with its exit code."""
    try:
        from gpumesh.cli.root_command import run_app

        run_app()
    except KeyboardInterrupt:
        sys.exit(130)
