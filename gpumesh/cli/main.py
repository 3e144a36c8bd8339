"""The entry point of `gpumesh`.

Importing the command line takes a tenth of a second, and Ctrl-C must not show a traceback in that time either. So
nothing is imported before ``main`` runs.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Never returns."""
    try:
        from gpumesh.cli.root_command import run_app

        run_app()
    except KeyboardInterrupt:
        sys.exit(130)
