"""The part of a tunnel that this room uses: it runs commands and guarded programs on the tunnel's host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gpumesh.tunnels.base import ExecResult
from gpumesh.tunnels.base import ProgramStream as ProgramStream  # noqa: PLC0414 - a part of this interface

MAX_PATH_LENGTH = 1024


class HostRoute(Protocol):
    """The way to one host; see ``tunnels.base.Tunnel``."""

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int = 1 << 20, shareable: bool = False
    ) -> ExecResult: ...

    async def open_program(self, argv: Sequence[str]) -> ProgramStream: ...


def is_host_path(text: str | None) -> bool:
    """Whether what a host has written is an absolute path that can be shown to a person as it is."""
    return text is not None and text.startswith("/") and text.isprintable() and len(text) <= MAX_PATH_LENGTH
