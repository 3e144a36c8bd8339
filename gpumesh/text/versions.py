"""Compares version numbers as servers write them (``0.10.0-rc1`` is older than ``v0.10.0``). Pure.

A text that is no version has no key. No text raises an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Digits are 0 to 9 only: str.isdigit() is also true for ``²``, which int() refuses.
_VERSION = re.compile(
    r"v?(?P<release>[0-9]{1,9}(?:\.[0-9]{1,9}){0,5})(?:(?:[-+~_ ]|\.(?=[A-Za-z]))(?P<suffix>.*))?", re.DOTALL
)
_PRERELEASE = re.compile(
    r"(?P<stage>dev|alpha|a|beta|b|pre|preview|rc)[.-]?(?P<number>[0-9]{1,9})?(?:[^0-9a-z].*)?", re.DOTALL
)
_STAGES = {"dev": 0, "alpha": 1, "a": 1, "beta": 2, "b": 2, "pre": 3, "preview": 3, "rc": 4}  # the earliest has 0
_RELEASE_STAGE = len(_STAGES)  # higher than each stage before a release
_RELEASE_NUMBERS = 6  # as many as _VERSION allows; a release with fewer is filled up with zeros

# Three parts in this order: the numbers of the release, the stage, and the number within the stage (``2`` of ``rc2``).
VersionKey = tuple[tuple[int, ...], int, int]


def version_key(text: str) -> VersionKey | None:
    """Returns a key by which versions can be sorted; ``None`` for a text that is no version.

    ``0.9`` = ``0.9.0`` < ``0.10.0-rc1`` < ``0.10.0`` = ``0.10.0-lab``.
    """
    version = _VERSION.fullmatch(text.strip()[:100])  # a server may send a very long text
    if version is None:
        return None
    numbers = [int(part) for part in version["release"].split(".")]
    missing_zeros = [0] * (_RELEASE_NUMBERS - len(numbers))
    release = (*numbers, *missing_zeros)
    prerelease = _PRERELEASE.fullmatch((version["suffix"] or "").lower())
    if prerelease is None:  # no suffix, or a suffix such as ``lab`` that names no stage
        return release, _RELEASE_STAGE, 0
    return release, _STAGES[prerelease["stage"]], int(prerelease["number"] or 0)


def oldest_version(texts: Iterable[str]) -> str | None:
    """Returns the text with the oldest version; ``None`` when no text is a version."""
    keys_and_texts = [(version_key(text), text) for text in texts]
    versions = [(key, text) for key, text in keys_and_texts if key is not None]
    if not versions:
        return None
    _, oldest_text = min(versions)
    return oldest_text
