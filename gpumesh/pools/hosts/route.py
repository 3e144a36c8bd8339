"""The part of a tunnel that this room uses: it runs commands and guarded programs on the tunnel's host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gpumesh.tunnels.base import ExecChunk, ExecResult


class ProgramStream(Protocol):
    """The input and the output of a program on a host, as ``Tunnel.open_program`` gives it. One task may read while
    another one writes."""

    async def write(self, data: bytes) -> None:
        """Sends ``data`` to the program's input. Raises TunnelDown."""

    async def read(self) -> ExecChunk:
        """Waits for the next piece of output. The piece with ``ended`` true is the last one. Raises ExecError and
        TunnelError when the program was cut off."""

    async def close(self) -> None:
        """Ends the program's input. May be called twice."""


class HostRoute(Protocol):
    """The way to one host; see ``tunnels.base.Tunnel``."""

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int = 1 << 20, shareable: bool = False
    ) -> ExecResult: ...

    async def open_program(self, argv: Sequence[str]) -> ProgramStream: ...
