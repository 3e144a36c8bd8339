"""Splits the value of UserKnownHostsFile, which may name several files."""

from __future__ import annotations

import re
from pathlib import Path

_MAX_FILES = 32
_QUOTED_OR_WORD = re.compile(r'"([^"]*)"|(\S+)')


def split_files(value: str) -> list[str]:
    """Returns the files of UserKnownHostsFile, without those that mean no file (``none``, ``/dev/null``).

    ``ssh -G`` prints them without the quotes that stand in ``~/.ssh/config``. So of several words in a row that are the
    path of a file with spaces, the file is meant.
    """
    quoted = '"' in value
    words = [match[1] or match[2] or "" for match in _QUOTED_OR_WORD.finditer(value)]
    files = words if quoted else _join_words(words)
    return [file for file in files if file not in ("", "none", "/dev/null")]


def _join_words(words: list[str]) -> list[str]:
    """Joins as many words as are the path of a file together, from the first on. A word that begins no such path stays
    alone."""
    files: list[str] = []
    rest = words[:_MAX_FILES]
    while rest:
        count = next((count for count in range(len(rest), 1, -1) if Path(" ".join(rest[:count])).is_file()), 1)
        files.append(" ".join(rest[:count]))
        rest = rest[count:]
    return files
