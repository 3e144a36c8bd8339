"""Where the process begins. Importing the command line takes a tenth of a second, in which Ctrl-C is no traceback
either: so nothing is imported before ``main``."""

from __future__ import annotations

import sys


def main() -> None:
    """Never returns."""
    try:
        from gpumesh.cli import root

        root.run_app()
    except KeyboardInterrupt:
        sys.exit(130)
