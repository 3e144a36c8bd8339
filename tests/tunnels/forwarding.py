"""A forwarder in front of a server at a Unix socket, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

from gpumesh.tunnels.forwarder import Forwarder
from gpumesh.tunnels.openssh.unix_relay import relay_to_unix
from tests.tunnels.polling import wait_until

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def running_forwarder(local: socket.socket, path: Path) -> AsyncIterator[Forwarder]:
    forwarder = Forwarder()
    forwarder.listen(local, relay_to_unix(str(path)))
    forwarder.start()
    try:
        yield forwarder
    finally:
        assert await asyncio.to_thread(forwarder.close)


@contextlib.asynccontextmanager
async def forwarded_to(
    handler: Handler, local: socket.socket, folder: Path, *, backlog: int = 1024
) -> AsyncIterator[Forwarder]:
    """Forwards ``local`` to a server of ``handler`` on a Unix socket."""
    path = folder / "s"

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(handle, path, backlog=backlog)
    async with server, running_forwarder(local, path) as forwarder:
        yield forwarder


def port_of(local: socket.socket) -> int:
    return int(local.getsockname()[1])


async def connect(local: socket.socket) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port_of(local)))
    return sock


async def wait_until_still(count: Callable[[], int], still_s: float = 0.3) -> None:
    """Until ``count`` has begun and then has not moved for ``still_s``."""
    loop = asyncio.get_running_loop()
    last, since = count(), loop.time()

    def stands() -> bool:
        nonlocal last, since
        if count() != last or last == 0:
            last, since = count(), loop.time()
        return loop.time() - since > still_s

    await wait_until(stands, "a standstill")


@contextlib.contextmanager
def descriptor_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
