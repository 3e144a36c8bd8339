"""Free disk space where a host keeps its models: without this probe a full disk shows only at the next pull."""

from __future__ import annotations

import re

# Asks for the disk of the first of these folders that exists. It is a constant, so that nothing needs quoting. By
# POSIX, df with -P writes one line for each disk.
SCRIPT = (
    'for d in "$OLLAMA_MODELS" /usr/share/ollama/.ollama/models "$HOME/.ollama/models" "$HOME/.ollama"; '
    'do [ -n "$d" ] && [ -d "$d" ] && LC_ALL=C exec df -Pk "$d"; done'
)
FREE_SPACE_COMMAND = ("sh", "-c", SCRIPT)
# The row of a disk: total, used and available KiB, and the used share. The available space may be negative.
_ROW = re.compile(rb"\s([0-9]{1,15})\s+[0-9]{1,15}\s+(-?[0-9]{1,15})\s+[0-9]{1,3}%\s")


def read_free_mib(output: bytes) -> int | None:
    """The available space in the output of ``df -Pk``, in MiB; ``None`` for any other output. Never raises."""
    rows = _ROW.findall(output[: 1 << 16])
    if len(rows) != 1:
        return None
    return max(int(rows[0][1]), 0) // 1024
