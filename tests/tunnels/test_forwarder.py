"""The selector thread, with connections passed on to a Unix socket as transport openssh does it."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from gpumesh.tunnels.forwarder import CHUNK_BYTES, Forwarder, UnixRelay, close_with_reset, relay_to_unix
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import listener
from tests.tunnels.traffic import echo, exchange

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def local() -> Iterator[socket.socket]:
    with listener() as sock:
        yield sock


@contextlib.asynccontextmanager
async def forwarding(local: socket.socket, path: Path) -> AsyncIterator[Forwarder]:
    forwarder = Forwarder()
    forwarder.listen(local, relay_to_unix(str(path)))
    forwarder.start()
    try:
        yield forwarder
    finally:
        assert await asyncio.to_thread(forwarder.close)


@contextlib.asynccontextmanager
async def to(handler: Handler, local: socket.socket, folder: Path, *, backlog: int = 1024) -> AsyncIterator[Forwarder]:
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
    async with server, forwarding(local, path) as forwarder:
        yield forwarder


def port_of(local: socket.socket) -> int:
    return int(local.getsockname()[1])


async def connect(local: socket.socket) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port_of(local)))
    return sock


# -- bytes -----------------------------------------------------------------------------------------------------------


async def test_bytes_go_both_ways_and_nothing_is_left(local: socket.socket, tmp_path: Path) -> None:
    async with to(echo, local, tmp_path) as forwarder:
        big = bytes(range(256)) * 20_000
        answers = await asyncio.gather(*(exchange(port_of(local), big[number:]) for number in range(10)))
        assert answers == [big[number:] for number in range(10)]
        await wait_until(lambda: forwarder.connections == 0, "no connection left")


async def test_each_direction_ends_by_itself(local: socket.socket, tmp_path: Path) -> None:
    """The host ends first and goes on reading; and the other way round."""
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def ends_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"all I have to say")
        writer.write_eof()
        heard.set_result(await reader.read())
        writer.close()

    async with to(ends_first, local, tmp_path) as forwarder:
        loop = asyncio.get_running_loop()
        with await connect(local) as sock:
            said = b""
            async with asyncio.timeout(20):
                while piece := await loop.sock_recv(sock, 1000):
                    said += piece
                await loop.sock_sendall(sock, b"still here")
                sock.shutdown(socket.SHUT_WR)
                assert await heard == b"still here"
        assert said == b"all I have to say"
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

    async with to(pour, local, tmp_path) as forwarder:
        with await connect(local) as sock:
            await _standstill(lambda: sent)
            assert sent < total // 2  # what the kernel's buffers hold; we hold one CHUNK
            (link,) = forwarder._links
            assert isinstance(link, UnixRelay)
            assert sum(len(one) for one in link._pending) <= 2 * CHUNK_BYTES
            received = 0
            async with asyncio.timeout(30):
                while piece := await asyncio.get_running_loop().sock_recv(sock, 1 << 20):
                    received += len(piece)
            assert received == total


async def test_a_host_that_does_not_read_stops_the_client(local: socket.socket, tmp_path: Path) -> None:
    go = asyncio.Event()
    heard = 0

    async def wait_then_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        await go.wait()
        while piece := await reader.read(1 << 20):
            heard += len(piece)
        writer.close()

    total, sent = 64 << 20, 0
    async with to(wait_then_read, local, tmp_path):
        loop = asyncio.get_running_loop()
        with await connect(local) as sock:

            async def send() -> None:
                nonlocal sent
                while sent < total:
                    await loop.sock_sendall(sock, b"x" * 65536)
                    sent += 65536
                sock.shutdown(socket.SHUT_WR)

            sending = asyncio.create_task(send())
            await _standstill(lambda: sent)
            assert sent < total // 2
            go.set()
            async with asyncio.timeout(30):
                await sending
                assert await loop.sock_recv(sock, 1) == b""
            assert heard == total


async def test_who_is_stuck_does_not_hold_up_others(local: socket.socket, tmp_path: Path) -> None:
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

    async with to(serve, local, tmp_path):
        loop = asyncio.get_running_loop()
        with await connect(local) as first, await connect(local) as second:
            for stuck in (first, second):
                await loop.sock_sendall(stuck, b"p")
            await _standstill(lambda: sent)
            for number in range(50):
                assert await exchange(port_of(local), b"e%d" % number) == b"%d" % number


async def _standstill(count: Callable[[], int], still_s: float = 0.3) -> None:
    """Until ``count`` has begun and then has not moved for ``still_s``."""
    loop = asyncio.get_running_loop()
    last, since = count(), loop.time()

    def stands() -> bool:
        nonlocal last, since
        if count() != last or last == 0:
            last, since = count(), loop.time()
        return loop.time() - since > still_s

    await wait_until(stands, "a standstill")


# -- ends ------------------------------------------------------------------------------------------------------------


async def test_nothing_listens_there(local: socket.socket, tmp_path: Path) -> None:
    async with forwarding(local, tmp_path / "nobody") as forwarder:
        with pytest.raises(ConnectionResetError):
            await exchange(port_of(local), b"x")
        await wait_until(lambda: forwarder.connections == 0, "it is forgotten")  # by the selector's thread


async def test_a_host_that_cuts_is_a_reset(local: socket.socket, tmp_path: Path) -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.transport.abort()  # with unread input a Unix socket's peer sees a reset

    async with to(cut, local, tmp_path):
        with pytest.raises(ConnectionResetError):
            await exchange(port_of(local), b"x" * 3_000_000)


async def test_closing_resets_clients_and_leaves_the_listener(local: socket.socket, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with to(echo, local, tmp_path) as forwarder:
        with await connect(local) as sock:
            await loop.sock_sendall(sock, b"half")
            assert await loop.sock_recv(sock, 4) == b"half"
            assert await asyncio.to_thread(forwarder.close)
            assert await asyncio.to_thread(forwarder.close)  # again
            with pytest.raises(ConnectionResetError):
                await loop.sock_recv(sock, 1)
        waiting = asyncio.create_task(exchange(port_of(local), b"for the next one"))
        async with forwarding(local, tmp_path / "s"):
            assert await waiting == b"for the next one"


async def test_closed_before_it_ran(local: socket.socket) -> None:
    ended: list[str] = []
    forwarder = Forwarder(lambda: ended.append("end"))
    forwarder.listen(local, relay_to_unix("/nonexistent"))
    assert forwarder.close()
    forwarder.run()  # as a thread would that is late: returns
    forwarder.post(lambda: ended.append("posted"))  # dropped
    assert ended == ["end"]


async def test_an_error_in_a_handler_ends_it_and_is_told(local: socket.socket) -> None:
    """Not in silence: whoever waits for the connection has to hear that nothing is forwarded any more."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def dial(forwarder: Forwarder, local: socket.socket) -> None:
        local.close()
        raise ZeroDivisionError

    def on_end() -> None:
        loop.call_soon_threadsafe(ended.set)

    forwarder = Forwarder(on_end)
    forwarder.listen(local, dial)
    running = asyncio.create_task(asyncio.to_thread(forwarder.run))
    with await connect(local), pytest.raises(ZeroDivisionError):
        await running
    await asyncio.wait_for(ended.wait(), 10)


# -- scale -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_thousand_connections_at_once(local: socket.socket, tmp_path: Path) -> None:
    count = 1000
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 5 * count:
        pytest.skip(f"at most {hard} descriptors a process here")
    with _descriptor_limit(5 * count):
        all_there = asyncio.Event()
        there = 0

        async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal there
            data = await reader.readexactly(4)
            there += 1
            if there == count:
                all_there.set()
            await all_there.wait()
            writer.write(data)
            writer.close()

        async with to(hold, local, tmp_path) as forwarder:
            asked = [asyncio.create_task(exchange(port_of(local), b"%04d" % number)) for number in range(count)]
            async with asyncio.timeout(30):
                await all_there.wait()
            assert forwarder.connections == count
            assert await asyncio.gather(*asked) == [b"%04d" % number for number in range(count)]
            await wait_until(lambda: forwarder.connections == 0, "no connection left")


async def test_a_full_queue_at_the_host_is_waited_for(local: socket.socket, tmp_path: Path) -> None:
    """A Unix socket's connect fails with EAGAIN when ssh's own queue is full, and tells nobody when it is not."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)
        server.setblocking(False)
        async with forwarding(local, path):
            asked = [asyncio.create_task(exchange(port_of(local), b"x")) for _ in range(8)]
            await asyncio.sleep(0.05)  # so that some find it full; whether they do or not, all must be served
            loop = asyncio.get_running_loop()
            for _ in asked:
                peer, _ = await loop.sock_accept(server)
                with peer:
                    await loop.sock_sendall(peer, await loop.sock_recv(peer, 1))
            assert await asyncio.gather(*asked) == [b"x"] * 8


@pytest.mark.parametrize("left", [0, 1])
async def test_out_of_descriptors(local: socket.socket, tmp_path: Path, left: int) -> None:
    """A connection takes two. While there is none, clients wait; with one, they are reset. Neither ends the others."""
    async with to(echo, local, tmp_path) as forwarder:
        clients = [socket.socket() for _ in range(6)]
        with contextlib.ExitStack() as stack:
            for client in clients:
                stack.enter_context(client)
                client.settimeout(20)
            probe = socket.socket()
            highest = probe.fileno()
            probe.close()
            with _descriptor_limit(highest + left):
                for client in clients:
                    with contextlib.suppress(ConnectionError):  # one that was reset so soon
                        client.connect(("127.0.0.1", port_of(local)))  # the kernel's queue takes them
                await asyncio.sleep(0.3)
            served = 0
            for client in clients:
                with contextlib.suppress(ConnectionError):
                    client.sendall(b"x")
                    served += await asyncio.to_thread(client.recv, 1) == b"x"
            if left == 0:
                assert served == len(clients)
        assert await exchange(port_of(local), b"alive") == b"alive"
        await wait_until(lambda: forwarder.connections == 0, "no connection left")


@contextlib.contextmanager
def _descriptor_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- the loop itself -------------------------------------------------------------------------------------------------


async def test_posted_and_timed_callbacks_run_in_order(local: socket.socket) -> None:
    ran: list[str] = []
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    forwarder = Forwarder()
    forwarder.start()

    def end() -> None:
        loop.call_soon_threadsafe(done.set)

    def begin() -> None:
        forwarder.call_later(0.02, lambda: ran.append("later"))
        forwarder.call_later(0.01, lambda: ran.append("sooner"))
        forwarder.call_later(0.01, lambda: ran.append("sooner, in order"))
        forwarder.call_later(0.03, end)
        ran.append("now")

    forwarder.post(begin)
    await asyncio.wait_for(done.wait(), 10)
    assert ran == ["now", "sooner", "sooner, in order", "later"]
    assert await asyncio.to_thread(forwarder.close)


def test_a_reset_is_a_reset() -> None:
    with listener() as local, socket.create_connection(local.getsockname()) as client:
        peer, _ = local.accept()
        close_with_reset(peer)
        client.settimeout(10)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    here, there = socket.socketpair()
    with here:
        close_with_reset(there)  # which a Unix socket does not know
        assert here.recv(1) == b""
