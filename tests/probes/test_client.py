"""The client of probes against servers that are there and gone again."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

import httpx
import pytest

from gpumesh.daemon import loop
from gpumesh.probes.client import http_client


@contextlib.contextmanager
def resetting() -> Iterator[str]:
    """A server that resets each connection as soon as it stands: so is the end of a tunnel with nobody behind it."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve() -> None:
        while True:
            try:
                sock, _ = listening.accept()
            except OSError:
                return
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def test_a_connection_that_is_reset_at_once_is_an_http_error() -> None:
    """On the loop that the command runs on: its sockets are gone when they are asked for their peer."""

    async def ask(url: str) -> None:
        async with http_client() as client:
            for _ in range(300):
                with pytest.raises(httpx.HTTPError):
                    await client.get(url)

    with resetting() as url:
        loop.run(ask(url))
