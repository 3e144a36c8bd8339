"""Versions as servers write them, put in order. Pure; a text that is no version has no place in the order, and no text
raises."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Digits are 0 to 9: for ``²`` and others str.isdigit() is true as well, and int() refuses them.
_VERSION = re.compile(r"v?([0-9]{1,9}(?:\.[0-9]{1,9}){0,5})(?:(?:[-+~_ ]|\.(?=[A-Za-z]))(.*))?", re.DOTALL)
_BEFORE_RELEASE = re.compile(r"(dev|alpha|a|beta|b|pre|preview|rc)[.-]?([0-9]{1,9})?(?:[^0-9a-z].*)?", re.DOTALL)
_STAGES = {"dev": 0, "alpha": 1, "a": 1, "beta": 2, "b": 2, "pre": 3, "preview": 3, "rc": 4}
_PARTS = 6

VersionKey = tuple[tuple[int, ...], int, int]


def version_key(text: str) -> VersionKey | None:
    """What orders versions, ``None`` for what is none: ``0.9`` = ``0.9.0`` < ``0.10.0-rc1`` < ``0.10.0`` =
    ``0.10.0-lab``."""
    match = _VERSION.fullmatch(text.strip()[:100])
    if match is None:
        return None
    numbers = [int(part) for part in match[1].split(".")]
    release = (*numbers, *[0] * (_PARTS - len(numbers)))
    early = _BEFORE_RELEASE.fullmatch((match[2] or "").lower())
    if early is None:
        return release, len(_STAGES), 0
    return release, _STAGES[early[1]], int(early[2] or 0)


def oldest_version(texts: Iterable[str]) -> str | None:
    """The oldest of those that are versions; ``None`` when none is."""
    keyed = [(key, text) for text in texts if (key := version_key(text)) is not None]
    return min(keyed)[1] if keyed else None
