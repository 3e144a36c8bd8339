"""Connections that are relayed to a Unix socket: bytes, back-pressure and ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest

from gpumesh.tunnels.forwarder import CHUNK_BYTES, Forwarder
from gpumesh.tunnels.openssh.unix_relay import UnixRelay, relay_to_port
from tests.tunnels.forwarding import connect, forwarded_to, port_of, running_forwarder, wait_until_still
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import serving
from tests.tunnels.traffic import echo, exchange


async def test_bytes_go_both_ways_and_nothing_is_left(local: socket.socket, tmp_path: Path) -> None:
    async with forwarded_to(echo, local, tmp_path) as forwarder:
        big = bytes(range(256)) * 20_000
        answers = await asyncio.gather(*(exchange(port_of(local), big[number:]) for number in range(10)))
        assert answers == [big[number:] for number in range(10)]
        await wait_until(lambda: forwarder.connections == 0, "no connection left")


async def test_each_direction_ends_separately(local: socket.socket, tmp_path: Path) -> None:
    """The host ends first and goes on reading; then the client ends."""
    received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def ends_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"all I have to say")
        writer.write_eof()
        received.set_result(await reader.read())
        writer.close()

    async with forwarded_to(ends_first, local, tmp_path) as forwarder:
        loop = asyncio.get_running_loop()
        with await connect(local) as sock:
            answer = b""
            async with asyncio.timeout(20):
                while piece := await loop.sock_recv(sock, 1000):
                    answer += piece
                await loop.sock_sendall(sock, b"still here")
                sock.shutdown(socket.SHUT_WR)
                assert await received == b"still here"
        assert answer == b"all I have to say"
        await wait_until(lambda: forwarder.connections == 0, "no connection left")


async def test_a_client_that_does_not_read_stops_the_sender(local: socket.socket, tmp_path: Path) -> None:
    total, sent = 64 << 20, 0

    async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while sent < total:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536
        writer.close()

    async with forwarded_to(pour, local, tmp_path) as forwarder:
        with await connect(local) as sock:
            await wait_until_still(lambda: sent)
            assert sent < total // 2  # the kernel's buffers; we hold one chunk
            (relay,) = forwarder._relays
            assert isinstance(relay, UnixRelay)
            assert sum(len(data) for data in relay._pending) <= 2 * CHUNK_BYTES
            received = 0
            async with asyncio.timeout(30):
                while piece := await asyncio.get_running_loop().sock_recv(sock, 1 << 20):
                    received += len(piece)
            assert received == total


async def test_a_host_that_does_not_read_stops_the_client(local: socket.socket, tmp_path: Path) -> None:
    go = asyncio.Event()
    received = 0

    async def wait_then_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        await go.wait()
        while piece := await reader.read(1 << 20):
            received += len(piece)
        writer.close()

    total, sent = 64 << 20, 0
    async with forwarded_to(wait_then_read, local, tmp_path):
        loop = asyncio.get_running_loop()
        with await connect(local) as sock:

            async def send() -> None:
                nonlocal sent
                while sent < total:
                    await loop.sock_sendall(sock, b"x" * 65536)
                    sent += 65536
                sock.shutdown(socket.SHUT_WR)

            sending = asyncio.create_task(send())
            await wait_until_still(lambda: sent)
            assert sent < total // 2
            go.set()
            async with asyncio.timeout(30):
                await sending
                assert await loop.sock_recv(sock, 1) == b""
            assert received == total


async def test_a_stuck_connection_delays_no_other(local: socket.socket, tmp_path: Path) -> None:
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        if await reader.readexactly(1) == b"e":
            writer.write(await reader.read())
        else:
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"x" * 65536)
                    await writer.drain()
                    sent += 65536
        writer.close()

    async with forwarded_to(serve, local, tmp_path):
        loop = asyncio.get_running_loop()
        with await connect(local) as first, await connect(local) as second:
            for stuck in (first, second):
                await loop.sock_sendall(stuck, b"p")
            await wait_until_still(lambda: sent)
            for number in range(50):
                assert await exchange(port_of(local), b"e%d" % number) == b"%d" % number


async def test_a_path_without_a_listener_resets_the_client(local: socket.socket, tmp_path: Path) -> None:
    async with running_forwarder(local, tmp_path / "nobody") as forwarder:
        with pytest.raises(ConnectionResetError):
            await exchange(port_of(local), b"x")
        await wait_until(lambda: forwarder.connections == 0, "the removal of the relay")


async def test_a_connection_that_the_host_cuts_is_reset(local: socket.socket, tmp_path: Path) -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.transport.abort()  # with unread input a Unix socket's peer sees a reset

    async with forwarded_to(cut, local, tmp_path):
        with pytest.raises(ConnectionResetError):
            await exchange(port_of(local), b"x" * 3_000_000)


async def test_a_full_listen_queue_delays_connections(local: socket.socket, tmp_path: Path) -> None:
    """A Unix socket's connect fails with EAGAIN while ssh's queue is full, and no event comes when there is room."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)
        server.setblocking(False)
        async with running_forwarder(local, path):
            asked = [asyncio.create_task(exchange(port_of(local), b"x")) for _ in range(8)]
            await asyncio.sleep(0.05)  # so that some clients meet a full queue; all of them must be served
            loop = asyncio.get_running_loop()
            for _ in asked:
                peer, _ = await loop.sock_accept(server)
                with peer:
                    await loop.sock_sendall(peer, await loop.sock_recv(peer, 1))
            assert await asyncio.gather(*asked) == [b"x"] * 8


@pytest.mark.parametrize("is_ssh_alive", [True, False])
async def test_an_end_that_comes_from_the_death_of_ssh_resets(tmp_path: Path, is_ssh_alive: bool) -> None:
    """An ssh that dies ends its connections as a host does that has sent all."""
    outcome: asyncio.Future[bytes | Exception] = asyncio.get_running_loop().create_future()

    async def read_all(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        try:
            outcome.set_result(await reader.read())
        except ConnectionError as error:
            outcome.set_result(error)

    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as control:
        for sock, name in ((listener, "r0"), (control, "control")):
            sock.bind(str(tmp_path / name))
            sock.listen(1)
        async with serving(read_all) as port:
            forwarder = Forwarder()
            forwarder.listen(listener, relay_to_port(port, tmp_path / "control"))
            forwarder.start()
            try:
                _reader, writer = await asyncio.open_unix_connection(tmp_path / "r0")
                writer.write(b"half")
                if not is_ssh_alive:
                    control.close()
                writer.write_eof()
                ended = await asyncio.wait_for(outcome, 20)
                writer.close()
            finally:
                assert await asyncio.to_thread(forwarder.close)
    assert ended == b"half" if is_ssh_alive else isinstance(ended, ConnectionResetError)
