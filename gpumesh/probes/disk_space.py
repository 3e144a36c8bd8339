"""How much room is left where a host keeps its models. For `audit`: a full disk shows itself only at the next pull."""

from __future__ import annotations

import re

# Constant, so that nothing needs quoting: the first of the folders that is there. POSIX: -P gives one line a disk.
SCRIPT = (
    'for d in "$OLLAMA_MODELS" /usr/share/ollama/.ollama/models "$HOME/.ollama/models" "$HOME/.ollama"; '
    'do [ -n "$d" ] && [ -d "$d" ] && LC_ALL=C exec df -Pk "$d"; done'
)
FREE_SPACE_COMMAND = ("sh", "-c", SCRIPT)
_ROW = re.compile(rb"\s([0-9]{1,15})\s+[0-9]{1,15}\s+(-?[0-9]{1,15})\s+[0-9]{1,3}%\s")


def read_free_mib(output: bytes) -> int | None:
    """What ``df -Pk`` has as available, in MiB; ``None`` for anything else. Never raises."""
    rows = _ROW.findall(output[: 1 << 16])
    if len(rows) != 1:
        return None
    return max(int(rows[0][1]), 0) // 1024
