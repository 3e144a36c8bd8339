"""Reads the plain parts of ``~/.ssh/config`` without ssh: Host, Match host, Include (ssh_config(5)).

This module is used where no ssh is installed, and for facts that ``ssh -G`` does not print.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from gpumesh.config.ssh.patterns import matches_pattern_list

SshOptions = list[tuple[str, str]]  # pairs of key (in lower case) and value

# Our own option, which stands for a Match exec that may apply to the host. ssh has no such option.
MATCH_EXEC_KEY = "match-exec"
MATCH_EXEC = (MATCH_EXEC_KEY, "yes")

_MAX_FILE_BYTES = 256 * 1024
_MAX_DEPTH = 16  # of files that include each other; ssh has the same limit
_MAX_FILES_PER_PATTERN = 64  # that one pattern of an Include may name
_MAX_OPTIONS = 20_000  # of all files together


def read_host_options(alias: str, home: Path) -> SshOptions:
    """Returns the options that ``~/.ssh/config`` and its included files set for ``alias``, in the order of the files.

    A condition that needs a program to run counts as false. Unreadable files are skipped, as ssh does with included
    files.
    """
    return list(islice(_read_options(home / ".ssh" / "config", alias, home, depth=0), _MAX_OPTIONS))


def parse_option_line(line: str) -> tuple[str, str]:
    """Returns the key (in lower case) and the value of a line ``Key value`` or ``Key=value``. Both are empty for a
    comment."""
    match = re.match(r"\s*(?P<key>[A-Za-z0-9]+)(?:\s*=\s*|\s+)?(?P<value>.*)", line)
    return (match["key"].lower(), match["value"].strip()) if match else ("", "")


def _read_options(path: Path, alias: str, home: Path, depth: int) -> Iterator[tuple[str, str]]:
    """Yields the options of this file and its included files that apply to ``alias``. ``depth`` counts the files that
    included this file."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_FILE_BYTES)
    except OSError:
        return
    applies = True  # whether the lines below the last Host or Match apply to ``alias``
    for line in text.splitlines():
        key, value = parse_option_line(line)
        if key == "host":
            applies = matches_pattern_list(alias, value.replace('"', "").split())
        elif key == "match":
            applies, depends_on_command = _evaluate_match(alias, value.split())
            if depends_on_command:
                yield MATCH_EXEC
        elif applies and key == "include" and depth < _MAX_DEPTH:
            for included_path in _find_included_files(value, home):
                yield from _read_options(included_path, alias, home, depth + 1)
        elif applies and key:
            yield key, value


def _find_included_files(value: str, home: Path) -> Iterator[Path]:
    """Yields the files that an Include names. Its value is a list of patterns; relative paths start from ``~/.ssh``."""
    for name in value.replace('"', "").split():
        pattern = os.path.join(home / ".ssh", name)
        if name.startswith("~/"):
            pattern = str(home / name.removeprefix("~/"))
        for path in sorted(glob.glob(pattern))[:_MAX_FILES_PER_PATTERN]:
            yield Path(path)


def _evaluate_match(alias: str, criteria: Sequence[str]) -> tuple[bool, bool]:
    """Returns whether a Match with these criteria applies to ``alias``, and whether a command decides that.

    If a command decides, the first value is False: no command is run here.
    """
    applies = True
    remaining = list(criteria)
    while remaining:
        word = remaining.pop(0)
        is_negated = word.startswith("!")
        criterion = word.removeprefix("!").lower()
        if criterion == "all":
            continue
        if criterion in ("host", "originalhost") and remaining:
            patterns = remaining.pop(0).split(",")
            is_fulfilled = matches_pattern_list(alias, patterns) != is_negated
            if not is_fulfilled:
                applies = False
        elif criterion == "exec":
            return False, applies  # the command decides only if the criteria before it apply
        else:  # user, localuser, final, canonical: not known before connecting
            return False, False
    return applies, False
