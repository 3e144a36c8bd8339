"""A proxy on uvloop that only copies bytes: its cost is the part of the gateway's cost that no code of ours causes.

python benchmarks/copying_proxy.py PORT TARGET_PORT
"""

from __future__ import annotations

import argparse
import asyncio
from functools import partial
from typing import cast

import uvloop


class Side(asyncio.Protocol):
    """One of two connections; what comes here goes to ``other``."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: Side | None = None
        self._pending = b""  # bytes from before the other connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)
        else:
            self._pending += data

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()

    def connect(self, other: Side) -> None:
        self.other, other.other = other, self
        if self._pending and other.transport is not None:
            other.transport.write(self._pending)


class Client(Side):
    def __init__(self, target_port: int) -> None:
        super().__init__()
        self._target_port = target_port
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        _, backend = await asyncio.get_running_loop().create_connection(Side, "127.0.0.1", self._target_port)
        self.connect(backend)


async def main(port: int, target_port: int) -> None:
    new = partial(Client, target_port)
    server = await asyncio.get_running_loop().create_server(new, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("target_port", type=int)
    given = parser.parse_args()
    uvloop.run(main(given.port, given.target_port))
