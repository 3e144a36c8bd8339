"""The file with the variables that a service has: ``NAME="value"`` a line, readable by its owner alone.

systemd reads it (``EnvironmentFile=``), and on macOS a shell does. Both read what stands in double quotes alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gpumesh.errors import UsageError
from gpumesh.files import atomic_file

HEAD = "# The variables of gpumesh as a service. Never commit this file: it holds secrets.\n"
_ASSIGNMENT = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)")
_QUOTED = re.compile(r'["\\$`]')


def read_names(path: Path) -> frozenset[str]:
    """The names of the variables to which the file gives a value. Empty if there is no such file, or if we may not read
    it."""
    try:
        text = path.read_text("utf-8", "surrogateescape")
    except OSError:
        return frozenset()
    matches = (_ASSIGNMENT.match(line) for line in text.splitlines())
    return frozenset(match[1] for match in matches if match is not None and match[2].strip(" \"'"))


def is_private(path: Path) -> bool:
    """Whether nobody but the owner may read the file. Raises OSError."""
    return path.stat().st_mode & 0o077 == 0


def add_variables(path: Path, values: Mapping[str, str]) -> None:
    """Writes these variables into the file, and keeps its other lines. The file gets mode 0600. Raises UsageError for a
    value with a line break, and OSError."""
    for name, value in values.items():
        if "\n" in value or "\r" in value or "\0" in value:
            raise UsageError(f"the value of {name} has more than one line, which {path} cannot hold")
    try:
        lines = path.read_text("utf-8", "surrogateescape").splitlines(keepends=True)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lines = [HEAD]
    kept = [line if line.endswith("\n") else f"{line}\n" for line in lines if _name_of(line) not in values]
    added = [f'{name}="{_QUOTED.sub(_escape, value)}"\n' for name, value in sorted(values.items())]
    atomic_file.replace(path, "".join((*kept, *added)), mode=0o600, errors="surrogateescape")


def _name_of(line: str) -> str | None:
    match = _ASSIGNMENT.match(line)
    return None if match is None else match[1]


def _escape(match: re.Match[str]) -> str:
    return f"\\{match[0]}"
