"""Reads ``keep_alive`` of a request to the simulated Ollama: how long a model stays in memory after its last use."""

from __future__ import annotations

import math
import re

_UNIT_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"([0-9]*\.?[0-9]+)(ns|us|µs|ms|s|m|h)")


def parse_keep_alive(keep_alive: object, default: float) -> float:
    """Reads Ollama's ``keep_alive``, in seconds: ``default`` for ``None``, ``inf`` (for ever) for a negative value.

    A number is in seconds, a string is a Go duration such as ``1h30m``. Raises ``ValueError`` for anything else.
    """
    if keep_alive is None:
        return default
    if isinstance(keep_alive, (int, float)) and not isinstance(keep_alive, bool):
        seconds = float(keep_alive)
    else:
        text = str(keep_alive).strip()
        unsigned = text.removeprefix("-")
        if unsigned == "0":  # the only number that Go takes without a unit
            return 0.0
        if not re.fullmatch(rf"(?:{_DURATION_PART.pattern})+", unsigned):
            raise ValueError(f"time: invalid duration {text!r}")
        seconds = sum(float(number) * _UNIT_SECONDS[unit] for number, unit in _DURATION_PART.findall(unsigned))
        if text.startswith("-"):
            seconds = -seconds
    return math.inf if seconds < 0 else seconds
