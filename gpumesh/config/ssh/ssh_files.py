"""The plain parts of OpenSSH's configuration files: Host, Match host, Include, first value wins (ssh_config(5)).

Only where there is no ssh to ask, and for what ``ssh -G`` does not tell.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpumesh.config.ssh.patterns import matches_pattern_list

SshOptions = list[tuple[str, str]]

# Stands for a Match exec that may concern the host: no directive of that name exists.
MATCH_EXEC = ("match-exec", "yes")

_LIMIT = 256 * 1024
_MAX_DEPTH = 16  # as ssh
_MAX_LINES = 20_000


def read_host_options(alias: str, home: Path) -> SshOptions:
    """What ``~/.ssh/config``, and what it includes, sets for ``alias``, in order. Conditions that cannot be judged
    without running something do not hold. Unreadable files are passed over, as ssh does with what it includes."""
    pairs: SshOptions = []
    for number, found in enumerate(_walk(home / ".ssh" / "config", alias, home, True, 0)):
        if number >= _MAX_LINES:
            break
        pairs.append(found)
    return pairs


def parse_option_line(line: str) -> tuple[str, str]:
    """``Key value`` or ``Key=value``; keys are case-insensitive."""
    match = re.match(r"\s*([A-Za-z0-9]+)(?:\s*=\s*|\s+)?(.*)", line)
    return (match[1].lower(), match[2].strip()) if match else ("", "")


def _walk(path: Path, alias: str, home: Path, active: bool, depth: int) -> Iterator[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_LIMIT)
    except OSError:
        return
    for line in text.splitlines():
        key, value = parse_option_line(line)
        if key == "host":
            active = matches_pattern_list(alias, value.replace('"', "").split())
        elif key == "match":
            active, runs = _match(alias, value.split())
            if runs:
                yield MATCH_EXEC
        elif active and key == "include" and depth < _MAX_DEPTH:
            for name in value.replace('"', "").split():
                whole = str(home / name[2:]) if name.startswith("~/") else os.path.join(home / ".ssh", name)
                for inside in sorted(glob.glob(whole))[:64]:
                    yield from _walk(Path(inside), alias, home, True, depth + 1)
        elif active and key:
            yield key, value


def _match(alias: str, words: Sequence[str]) -> tuple[bool, bool]:
    """Whether a Match holds, and whether that depends on a command."""
    holds, runs = True, False
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        criterion = word.removeprefix("!").lower()
        if criterion == "all":
            continue
        if criterion in ("host", "originalhost") and remaining:
            holds = holds and matches_pattern_list(alias, remaining.pop(0).split(",")) is not word.startswith("!")
        elif criterion == "exec":
            runs = holds
            break
        else:  # user, localuser, final, canonical: not known before connecting
            holds = False
            break
    return holds and not runs, runs
