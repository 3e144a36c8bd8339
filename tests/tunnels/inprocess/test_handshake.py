from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.errors import ConnectRefused, ConnectTimeout, TunnelError
from gpumesh.topology import Target
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.inprocess import handshake
from gpumesh.tunnels.inprocess.connection import connect
from gpumesh.tunnels.inprocess.handshake import BufferedSocket, connect_tcp
from gpumesh.tunnels.jump_hosts import parse_jump
from gpumesh.tunnels.transport import ConnectRequest
from tests.hostile_peers import HostileBannerServer, repeat_bytes
from tests.parts import needs
from tests.tunnels.inprocess.test_connection import Told
from tests.tunnels.sshd import Sshd, listener, serving
from tests.tunnels.traffic import echo, exchange

# -- pure ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jump", "expected"),
    [
        ("bastion", ("me", "bastion", 22)),
        ("root@bastion", ("root", "bastion", 22)),
        ("root@bastion:2222", ("root", "bastion", 2222)),
        ("bastion:2222", ("me", "bastion", 2222)),
        ("a@b@bastion", ("a@b", "bastion", 22)),  # a user name may hold one
        ("[::1]:2222", ("me", "::1", 2222)),
        ("root@[::1]", ("root", "::1", 22)),
        ("::1", ("me", "::1", 22)),
        ("root@fe80::1%eth0", ("root", "fe80::1%eth0", 22)),
    ],
)
def test_jump_hosts(jump: str, expected: tuple[str, str, int]) -> None:
    assert parse_jump(jump, "me") == expected


@pytest.mark.parametrize("jump", ["", "root@", ":22", "root@:22", "host:port", "[::1]:port"])
def test_what_is_no_jump_host(jump: str) -> None:
    with pytest.raises(ValueError):
        parse_jump(jump, "me")


@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=20),
    st.lists(st.tuples(st.booleans(), st.integers(1, 500)), max_size=60),
)
def test_reading_ahead_changes_nothing_of_what_is_read(pieces: list[bytes], reads: list[tuple[bool, int]]) -> None:
    here, there = socket.socketpair()
    with here, there:
        buffered = BufferedSocket(here)
        for piece in pieces:
            there.sendall(piece)
        there.shutdown(socket.SHUT_WR)
        read = b""
        for whole, size in reads:
            if whole:
                taken = buffered.take_buffered(size)
                assert taken is None or len(taken) == size
                read += taken or b""
            else:
                read += _some(buffered.recv(size), size)
        while piece := buffered.recv(1000):
            read += _some(piece, 1000)
        assert read == b"".join(pieces)
        assert read.startswith(buffered.greeting)
        assert len(buffered.greeting) < 2 * handshake.KEPT_GREETING_BYTES


def _some(piece: bytes, size: int) -> bytes:
    assert len(piece) <= size
    return piece


# -- sockets ---------------------------------------------------------------------------------------------------------


def addresses(*ports: int) -> list[tuple[object, ...]]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_the_next_address_is_tried_when_one_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a name with an IPv6 address that leads nowhere."""
    with listener() as alive:
        ports = closed_port(), alive.getsockname()[1]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses(*ports))
        with connect_tcp("gpu", 22, Deadline(10.0, time.monotonic)) as sock:
            assert sock.getpeername()[1] == ports[1]
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_when_none_answers_the_last_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses(closed_port(), closed_port()))
    with pytest.raises(ConnectRefused, match="gpu:2222") as caught:
        connect_tcp("gpu", 2222, Deadline(10.0, time.monotonic))
    assert caught.value.hint


def test_a_black_hole_takes_no_more_than_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as hole, contextlib.ExitStack() as stack, listener() as alive:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        port = hole.getsockname()[1]
        for _ in range(4):  # until its queue is full: then it drops what comes
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filling.connect(("127.0.0.1", port))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses(port, alive.getsockname()[1]))
        deadline = Deadline(1.0, time.monotonic)
        with connect_tcp("gpu", 22, deadline):
            assert not deadline.expired
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses(port, port, port))
        with pytest.raises(ConnectTimeout, match="gpu"):
            connect_tcp("gpu", 22, Deadline(0.3, time.monotonic))


@needs("sshd")
@pytest.mark.real
async def test_a_connection_that_comes_in_crumbs(tmp_path: object) -> None:
    """Packets that arrive in pieces of a few bytes, in the handshake and after it: reading ahead must not mix them."""
    rng = random.Random(4253)

    async with Sshd(tmp_path / "sshd", {"LogLevel": "INFO"}) as sshd, serving(echo) as backend:  # type: ignore[operator]

        async def crumble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", sshd.port)

            async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                while data := await source.read(rng.randint(1, 40)):
                    sink.write(data)
                    await sink.drain()
                    if rng.random() < 0.05:
                        await asyncio.sleep(0.0005)
                sink.write_eof()

            try:
                await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
            except OSError:
                pass  # the test is over
            finally:
                far_writer.close()

        async with serving(crumble) as port:
            sshd.known_hosts.write_text(f"[127.0.0.1]:{port} {sshd.public_host_key}\n")
            with listener() as local:
                target = Target("127.0.0.1", backend)
                connection = await connect(ConnectRequest("n", sshd.spec(port=port), (target,)), [local], Told())
                data = rng.randbytes(50_000)
                assert await exchange(local.getsockname()[1], data) == data
                await connection.close()


# -- hosts that send without end -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "unit"),
    [
        (b"", b"a"),
        (b"SSH-2.0-x", b"a"),
        (b"", b"a line before the version\r\n"),
        (b"SSH-2.0-x\r\n", b"\x7f\xff\xff\xfc" + b"\x04" * 12),
    ],
    ids=["a line", "a version", "lines", "a packet"],
)
def test_what_never_gets_whole_is_not_collected(start: bytes, unit: bytes) -> None:
    """paramiko alone takes it until its time is over, joining it anew with each piece."""
    with HostileBannerServer(lambda: repeat_bytes(start, unit)) as host:
        sock = socket.create_connection(("127.0.0.1", host.port))
        before = time.process_time()
        with pytest.raises(TunnelError):
            handshake.perform_handshake(sock, host="127.0.0.1", port=host.port, deadline=Deadline(20.0, time.monotonic))
        assert time.process_time() - before < 5.0
        assert host.sent < 16 << 20, "the buffers of two sockets, not what would have come"
