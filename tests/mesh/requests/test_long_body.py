"""A long body to a TLS server is written piece by piece: so much is encrypted at once, and no more."""

from __future__ import annotations

import asyncio
import hashlib
import ssl

import pytest

from gpumesh.backends.base import HttpCall
from gpumesh.mesh.requests.long_body import PIECE_BYTES, LongBody
from gpumesh.mesh.requests.upstream import Upstream

BODY = bytes(range(256)) * (1 << 14)  # 4 MiB


class Recorder(asyncio.Transport):
    """Keeps what is written, and in which turn of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0
        self.written: list[tuple[int, bytes]] = []
        self.closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append((self.turn, bytes(data)))

    def is_closing(self) -> bool:
        return self.closing

    async def run_turns(self, count: int) -> None:
        for _ in range(count):
            self.turn += 1
            await asyncio.sleep(0)

    @property
    def data(self) -> bytes:
        return b"".join(data for _, data in self.written)


async def test_each_turn_writes_one_piece() -> None:
    transport = Recorder()
    body = LongBody(transport, BODY, asyncio.get_running_loop())
    body.start()
    await transport.run_turns(100)
    assert transport.data == BODY
    assert body.complete
    turns = [turn for turn, _ in transport.written]
    assert len(set(turns)) == len(turns) == len(BODY) // PIECE_BYTES


async def test_a_full_transport_gets_nothing_until_it_has_room() -> None:
    transport = Recorder()
    body = LongBody(transport, BODY, asyncio.get_running_loop())
    body.start()
    body.pause()
    await transport.run_turns(10)
    assert len(transport.written) == 1
    for _ in range(3):  # resumed again and again within one turn
        body.resume()
    await transport.run_turns(2)
    assert 2 <= len(transport.written) <= 3
    transport.closing = True
    await transport.run_turns(10)
    assert body.complete, "nothing is kept for a connection that is gone"
    assert len(transport.data) < len(BODY)


@pytest.mark.parametrize("answers_early", [False, True])
async def test_it_arrives_through_tls(
    answers_early: bool,
    trusted_tls: ssl.SSLContext,
) -> None:
    """A server that answers before it has all of the body ends the connection's use, but not the answer."""
    body = BODY * 4
    connections = 0
    done = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                text = (
                    b"early"
                    if answers_early
                    else hashlib.sha256(await reader.readexactly(len(body))).hexdigest().encode()
                )
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
                await writer.drain()
                if answers_early:
                    await done.wait()
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=trusted_tls, limit=1 << 16)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        async with asyncio.timeout(20), Upstream() as upstream:
            for _ in range(2):
                response = await upstream.request(url, HttpCall("POST", "/", body, ()), (), node="n")
                text = b""
                while data := await response.read():
                    text += data
                assert text == (b"early" if answers_early else hashlib.sha256(body).hexdigest().encode())
            assert connections == (2 if answers_early else 1)
    finally:
        done.set()
        server.close()
        await server.wait_closed()
