"""Compares versions as servers write them. Pure.

A text that is no version has no key. No text raises an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Digits are 0 to 9 only: str.isdigit() is also true for ``²``, which int() refuses.
_VERSION = re.compile(r"v?([0-9]{1,9}(?:\.[0-9]{1,9}){0,5})(?:(?:[-+~_ ]|\.(?=[A-Za-z]))(.*))?", re.DOTALL)
_PRERELEASE = re.compile(r"(dev|alpha|a|beta|b|pre|preview|rc)[.-]?([0-9]{1,9})?(?:[^0-9a-z].*)?", re.DOTALL)
_STAGES = {"dev": 0, "alpha": 1, "a": 1, "beta": 2, "b": 2, "pre": 3, "preview": 3, "rc": 4}
_RELEASE_NUMBERS = 6  # as many as _VERSION allows; a release with fewer is filled up with zeros

# The numbers of the release, the stage (a release comes after all of _STAGES), and the number within the stage.
VersionKey = tuple[tuple[int, ...], int, int]


def version_key(text: str) -> VersionKey | None:
    """The key to sort versions by; ``None`` for a text that is no version.

    ``0.9`` = ``0.9.0`` < ``0.10.0-rc1`` < ``0.10.0`` = ``0.10.0-lab``.
    """
    match = _VERSION.fullmatch(text.strip()[:100])
    if match is None:
        return None
    numbers = [int(part) for part in match[1].split(".")]
    release = (*numbers, *[0] * (_RELEASE_NUMBERS - len(numbers)))
    prerelease = _PRERELEASE.fullmatch((match[2] or "").lower())
    if prerelease is None:
        return release, len(_STAGES), 0
    return release, _STAGES[prerelease[1]], int(prerelease[2] or 0)


def oldest_version(texts: Iterable[str]) -> str | None:
    """The oldest version of ``texts``; ``None`` when no text is a version."""
    keys_and_texts = [(key, text) for text in texts if (key := version_key(text)) is not None]
    return min(keys_and_texts)[1] if keys_and_texts else None
