"""Probes the free disk space where a host keeps its models. Without it a full disk shows only at the next pull."""

from __future__ import annotations

import re

# Asks df for the disk of the first of these folders that exists. The script is a constant, so that nothing needs
# quoting. By POSIX, df with -P writes one line for each disk.
SCRIPT = (
    'for d in "$OLLAMA_MODELS" /usr/share/ollama/.ollama/models "$HOME/.ollama/models" "$HOME/.ollama"; '
    'do [ -n "$d" ] && [ -d "$d" ] && LC_ALL=C exec df -Pk "$d"; done'
)
FREE_SPACE_COMMAND = ("sh", "-c", SCRIPT)
OUTPUT_BYTES = 1 << 16  # of the script; the rest is not read
# The row of a disk: total, used and available KiB, and the used share. Only the available space is captured; it may be
# negative, because a part of a disk is reserved for root.
_ROW = re.compile(rb"\s[0-9]{1,15}\s+[0-9]{1,15}\s+(-?[0-9]{1,15})\s+[0-9]{1,3}%\s")


def read_free_mib(output: bytes) -> int | None:
    """The available space in MiB from the output of ``df -Pk`` for one disk; ``None`` for any other output. Never
    raises."""
    rows = _ROW.findall(output[:OUTPUT_BYTES])
    if len(rows) != 1:
        return None
    (available_kib,) = rows
    return max(int(available_kib), 0) // 1024
