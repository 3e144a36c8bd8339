"""Read-ahead does not change what paramiko reads; hosts that send without end are refused."""

from __future__ import annotations

import asyncio
import random
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.errors import TunnelError
from gpumesh.topology import Target
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.inprocess import handshake, packetizer
from gpumesh.tunnels.inprocess.connection import connect
from gpumesh.tunnels.inprocess.packetizer import BufferedSocket
from gpumesh.tunnels.transport import ConnectRequest
from tests.hostile_peers import HostileBannerServer, repeat_bytes
from tests.prerequisites import needs
from tests.tunnels.recorded_events import RecordedEvents
from tests.tunnels.sshd import Sshd, listener, serving
from tests.tunnels.traffic import echo, exchange


@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=20),
    st.lists(st.tuples(st.booleans(), st.integers(1, 500)), max_size=60),
)
def test_read_ahead_does_not_change_the_bytes(pieces: list[bytes], reads: list[tuple[bool, int]]) -> None:
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
        assert len(buffered.greeting) < 2 * packetizer.KEPT_GREETING_BYTES


def _some(piece: bytes, size: int) -> bytes:
    assert len(piece) <= size
    return piece


@needs("sshd")
@pytest.mark.real
async def test_packets_that_arrive_a_few_bytes_at_a_time(tmp_path: object) -> None:
    """Packets that arrive in pieces of a few bytes, in the handshake and after it: read-ahead must not mix them up."""
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
                connection = await connect(
                    ConnectRequest("n", sshd.spec(port=port), (target,)), [local], RecordedEvents()
                )
                data = rng.randbytes(50_000)
                assert await exchange(local.getsockname()[1], data) == data
                await connection.close()


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
def test_lines_and_packets_without_an_end_are_not_collected(start: bytes, unit: bytes) -> None:
    """paramiko itself collects it until its deadline, and joins all of it again with each piece."""
    with HostileBannerServer(lambda: repeat_bytes(start, unit)) as host:
        sock = socket.create_connection(("127.0.0.1", host.port))
        before = time.process_time()
        with pytest.raises(TunnelError):
            handshake.perform_handshake(sock, host="127.0.0.1", port=host.port, deadline=Deadline(20.0, time.monotonic))
        assert time.process_time() - before < 5.0
        assert host.sent < 16 << 20, "no more than the buffers of two sockets"
