"""``python -m gpumesh``: the command line, for when the command `gpumesh` is not on PATH."""

from __future__ import annotations

from gpumesh.cli.main import main

if __name__ == "__main__":
    main()
