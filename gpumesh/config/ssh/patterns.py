"""Matches host names against OpenSSH's patterns (``*.example.com,!old``) of ``Host`` lines and known_hosts. Pure.

The patterns are described under PATTERNS in ssh_config(5).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


def matches_pattern_list(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern matches ``name``, and no pattern with ``!`` in front does. Upper and lower case differ."""
    is_matched = False
    for pattern in patterns:
        is_negated = pattern.startswith("!")
        if matches_pattern(name, pattern.removeprefix("!")):
            if is_negated:
                return False
            is_matched = True
    return is_matched


def matches_pattern(name: str, pattern: str) -> bool:
    """Whether ``pattern``, which may contain ``*`` and ``?``, matches ``name``."""
    # fnmatch would read the brackets of [host]:port as a class of characters. OpenSSH has no such classes.
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))
