"""Lists of names as people write them: ``a, b and c``, or ``a, b and 3 more``. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def join_all(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return "".join(names) if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"


def join_some(names: Sequence[str], limit: int) -> str:
    """The first ``limit`` names and how many there are besides: ``a, b and 3 more``."""
    hidden_count = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {hidden_count} more" if hidden_count > 0 else "")
