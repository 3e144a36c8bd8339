"""OpenSSH's patterns (PATTERNS in ssh_config(5)), as ``Host`` lines and known_hosts files have them. Pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


def matches_pattern_list(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern matches ``name`` and no pattern with ``!`` in front of it does. Case counts."""
    matched = False
    for pattern in patterns:
        negated = pattern.startswith("!")
        if matches_pattern(name, pattern.removeprefix("!")):
            if negated:
                return False
            matched = True
    return matched


def matches_pattern(name: str, pattern: str) -> bool:
    """OpenSSH knows ``*`` and ``?`` only: ``[host]:port`` is no class of characters."""
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))
