"""The places of llama-server's buffers, by their names in its log. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

_RPC_BUFFER = re.compile(r"RPC(?P<number>[0-9]{1,3})\[(?P<endpoint>[0-9.]{7,15}:[0-9]{1,5})\]")


@dataclass(frozen=True, slots=True)
class BufferPlace:
    """Where a buffer is. ``endpoint`` is the worker's, as llama-server was given it; ``None``: on the head. ``number``
    counts the worker's devices from 0. ``name`` is the name of the head's device: ``CUDA0``, ``CPU``, ``CPU_Mapped``,
    ``CUDA_Host``."""

    name: str
    endpoint: str | None = None
    number: int = 0


def read_place(name: str) -> BufferPlace:
    """The place from a buffer's name: ``RPC0[127.0.0.1:50052]`` is the first device of that worker."""
    match = _RPC_BUFFER.fullmatch(name)
    if match is None:
        return BufferPlace(name)
    return BufferPlace("RPC", match["endpoint"], int(match["number"]))
