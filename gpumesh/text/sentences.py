"""Joins names to a list for a sentence: ``a, b and c``, or ``a, b and 3 more``. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def join_all(names: Sequence[str]) -> str:
    """Returns all names as one text: ``a``, or ``a and b``, or ``a, b and c``; an empty text for no names."""
    if len(names) < 2:
        return "".join(names)
    *first_names, last_name = names
    return f"{', '.join(first_names)} and {last_name}"


def join_some(names: Sequence[str], limit: int) -> str:
    """Returns the first ``limit`` names and the number of the other names: ``a, b and 3 more``. If there are no others,
    returns the names alone: ``a, b``."""
    shown_names = ", ".join(names[:limit])
    hidden_count = len(names) - limit
    return f"{shown_names} and {hidden_count} more" if hidden_count > 0 else shown_names
