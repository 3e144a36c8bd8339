"""The plain parts of OpenSSH's configuration files: Host, Match host, Include, first value wins (ssh_config(5)).

This module is used where no ssh is installed, and for facts that ``ssh -G`` does not print.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpumesh.config.ssh.patterns import matches_pattern_list

SshOptions = list[tuple[str, str]]

# Marks a Match exec that may apply to the host. There is no such option in ssh.
MATCH_EXEC = ("match-exec", "yes")

_MAX_FILE_BYTES = 256 * 1024
_MAX_DEPTH = 16  # of Include, as ssh
_MAX_FILES_PER_PATTERN = 64  # of an Include
_MAX_LINES = 20_000  # of all files together


def read_host_options(alias: str, home: Path) -> SshOptions:
    """The options that ``~/.ssh/config`` and its included files set for ``alias``, in order. Conditions that need a
    program to run count as false. Unreadable files are skipped, as ssh does with included files."""
    pairs: SshOptions = []
    for number, option in enumerate(_walk_options(home / ".ssh" / "config", alias, home, True, 0)):
        if number >= _MAX_LINES:
            break
        pairs.append(option)
    return pairs


def parse_option_line(line: str) -> tuple[str, str]:
    """The key, in lower case, and the value of a line ``Key value`` or ``Key=value``. Both are empty for a comment."""
    match = re.match(r"\s*([A-Za-z0-9]+)(?:\s*=\s*|\s+)?(.*)", line)
    return (match[1].lower(), match[2].strip()) if match else ("", "")


def _walk_options(path: Path, alias: str, home: Path, active: bool, depth: int) -> Iterator[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_FILE_BYTES)
    except OSError:
        return
    # ``active``: whether the lines at this place apply to ``alias``.
    for line in text.splitlines():
        key, value = parse_option_line(line)
        if key == "host":
            active = matches_pattern_list(alias, value.replace('"', "").split())
        elif key == "match":
            active, depends_on_command = _evaluate_match(alias, value.split())
            if depends_on_command:
                yield MATCH_EXEC
        elif active and key == "include" and depth < _MAX_DEPTH:
            for name in value.replace('"', "").split():
                pattern = str(home / name[2:]) if name.startswith("~/") else os.path.join(home / ".ssh", name)
                for included in sorted(glob.glob(pattern))[:_MAX_FILES_PER_PATTERN]:
                    yield from _walk_options(Path(included), alias, home, True, depth + 1)
        elif active and key:
            yield key, value


def _evaluate_match(alias: str, criteria: Sequence[str]) -> tuple[bool, bool]:
    """``(applies, depends_on_command)``. A Match that depends on a command counts as one that does not apply."""
    applies = True
    remaining = list(criteria)
    while remaining:
        word = remaining.pop(0)
        negated = word.startswith("!")
        criterion = word.removeprefix("!").lower()
        if criterion == "all":
            continue
        if criterion in ("host", "originalhost") and remaining:
            matched = matches_pattern_list(alias, remaining.pop(0).split(","))
            applies = applies and matched is not negated
        elif criterion == "exec":
            return False, applies
        else:  # user, localuser, final, canonical: unknown before connecting
            return False, False
    return applies, False
