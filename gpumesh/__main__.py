"""``python -m gpumesh``: the command line, where the command itself is not on PATH."""

from __future__ import annotations

from gpumesh.cli.main import main

if __name__ == "__main__":
    main()
