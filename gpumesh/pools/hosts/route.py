"""The part of a tunnel that this room uses: it runs commands and guarded programs on the tunnel's host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gpumesh.tunnels.base import ExecResult
from gpumesh.tunnels.base import ProgramStream as ProgramStream  # noqa: PLC0414 - a part of this interface


class HostRoute(Protocol):
    """The way to one host; see ``tunnels.base.Tunnel``."""

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int = 1 << 20, shareable: bool = False
    ) -> ExecResult: ...

    async def open_program(self, argv: Sequence[str]) -> ProgramStream: ...
