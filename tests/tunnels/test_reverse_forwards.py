"""Reverse forwards over both transports, against a real OpenSSH sshd: its ports lead to servers of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gpumesh.errors import ReverseForwardRefused
from gpumesh.topology import TransportKind
from gpumesh.tunnels.inprocess.reverse_channels import MAX_CONNECTIONS
from gpumesh.tunnels.local_system.listening_sockets import list_listening_sockets
from gpumesh.tunnels.transport import ReverseForward
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.prerequisites import needs
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import Sshd, port_of_this_worker, serving
from tests.tunnels.supervised import BACKOFF, LONG_S, WatchedTunnel, both, supervised, wait_reconnects
from tests.tunnels.traffic import echo, exchange

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]


@contextlib.asynccontextmanager
async def reversed_to(
    pool: WorkerPool, sshd: Sshd, transport: TransportKind, *local_ports: int
) -> AsyncIterator[tuple[WatchedTunnel, list[int]]]:
    """A tunnel that is up, and the host's port for each local port."""
    remote_ports = [port_of_this_worker() for _ in local_ports]
    reverse = [ReverseForward(*ports) for ports in zip(remote_ports, local_ports, strict=True)]
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), 1, reverse=reverse) as watched:
        await watched.tunnel.wait_up()
        yield watched, remote_ports


def addresses_of_listeners(port: int) -> list[str]:
    return [str(listener.address) for listener in list_listening_sockets() if listener.port == port]


@both
async def test_a_port_of_the_host_leads_here(sshd: Sshd, pool: WorkerPool, transport: TransportKind) -> None:
    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers only when the client has ended."""
        writer.write(b"%d bytes" % len(await reader.read()))

    async with (
        serving(echo) as echo_port,
        serving(count) as count_port,
        reversed_to(pool, sshd, transport, echo_port, count_port, 1) as (_watched, (to_echo, to_count, to_nothing)),
    ):
        for port in (to_echo, to_count, to_nothing):
            assert addresses_of_listeners(port) == ["127.0.0.1"]
        data = bytes(range(256)) * 12_000  # more than every buffer on its way
        assert await exchange(to_echo, data) == data
        assert await exchange(to_count, data) == b"%d bytes" % len(data)
        assert await asyncio.gather(*(exchange(to_echo, b"%d" % i) for i in range(10))) == [
            b"%d" % i for i in range(10)
        ]
        with contextlib.suppress(ConnectionResetError):
            assert await exchange(to_nothing, b"") == b""
        async with reversed_to(pool, sshd, transport, count_port) as (_other, (other_to_count,)):
            assert await exchange(other_to_count, b"other") == b"5 bytes"
        await wait_until(lambda: not addresses_of_listeners(other_to_count), "the end of the port")
        assert await exchange(to_echo, b"still") == b"still"


@both
async def test_it_comes_back_after_a_cut_which_resets_its_connections(
    sshd: Sshd, pool: WorkerPool, transport: TransportKind
) -> None:
    outcomes: asyncio.Queue[bytes | Exception] = asyncio.Queue()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(4))
        try:
            outcomes.put_nowait(await reader.read())
        except ConnectionError as error:
            outcomes.put_nowait(error)

    async with serving(hold) as local, reversed_to(pool, sshd, transport, local) as (watched, (remote,)):
        for times, sign in enumerate((signal.SIGKILL, signal.SIGSTOP), start=1):
            reader, writer = await asyncio.open_connection("127.0.0.1", remote)
            writer.write(b"half")
            assert await reader.readexactly(4) == b"half"
            sshd.kill_sessions(sign)
            watched.tunnel.suspect("for the second case")
            assert isinstance(await asyncio.wait_for(outcomes.get(), 20), ConnectionResetError)
            writer.close()
            if sign is signal.SIGSTOP:  # the host does not know that we are gone: the port is not free
                await wait_until(lambda: watched.tunnel.state.error_code == "reverse-forward-refused", "the refusal")
                assert watched.phase is BACKOFF
                sshd.kill_sessions()
            await wait_reconnects(watched, times)
        with watched.tunnel.held_closed():
            await wait_until(lambda: not addresses_of_listeners(remote), "the end of the port")
        await wait_reconnects(watched, 3)
        assert addresses_of_listeners(remote) == ["127.0.0.1"]


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", port_of_this_worker())) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({}, "does not listen at 127.0.0.1", "another program"),
        ({"AllowTcpForwarding": "local"}, "forbids reverse forwarding", "AllowTcpForwarding yes"),
        ({"GatewayPorts": "yes"}, "to its whole network", "GatewayPorts no"),
    ],
)
async def test_a_host_that_refuses(
    tmp_path: Path, pool: WorkerPool, options: dict[str, str], message: str, hint: str
) -> None:
    with taken_port() if not options else contextlib.nullcontext(port_of_this_worker()) as port:
        async with Sshd(tmp_path / "sshd", {"LogLevel": "INFO", **options}) as sshd:
            for transport in TransportKind:
                ssh = sshd.spec(transport=transport)
                async with supervised(pool, ssh, 1, reverse=[ReverseForward(port, 1)]) as watched:
                    with pytest.raises(ReverseForwardRefused, match=message) as caught:
                        await asyncio.wait_for(watched.tunnel.wait_up(), 20)
                    assert hint in (caught.value.hint or "")
                    await wait_until(lambda: not sshd.children(), "the end of the connection")
                    assert addresses_of_listeners(port) == ([] if options else ["127.0.0.1"])


@both
async def test_peers_that_do_not_read_hold_up_nobody(sshd: Sshd, pool: WorkerPool, transport: TransportKind) -> None:
    async def flood_or_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readexactly(1) == b"f":
            while True:
                writer.write(bytes(1 << 16))
                await writer.drain()
        if not writer.is_closing():
            await echo(reader, writer)

    async def stay_silent(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, contextlib.ExitStack() as stack:
        deaf_port = deaf.getsockname()[1]
        while True:  # until its queue is full, so that no more connections are made, and none is refused
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0.1)
            try:
                filler.connect(("127.0.0.1", deaf_port))
            except TimeoutError:
                break
        async with (
            serving(flood_or_echo) as active,
            serving(stay_silent) as silent,
            reversed_to(pool, sshd, transport, active, silent, deaf_port) as (watched, ports),
        ):
            to_active, to_silent, to_deaf = ports
            writers = []
            for port, request in ((to_active, b"f"), (to_silent, b""), (to_deaf, b"")):
                for _ in range(2):
                    _reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
                    writer.transport.set_write_buffer_limits(high=1)
                    writer.write(request or bytes(32 << 20))
                    writers.append(writer)
            for _ in range(2):
                assert await exchange(to_active, b"e" + bytes(1 << 20)) == bytes(1 << 20)
                assert (await watched.tunnel.exec(["true"], timeout_s=20)).exit_status == 0
            # The flood to the silent peers stands still, and most of it waits in this process.
            assert all(writer.transport.get_write_buffer_size() > 8 << 20 for writer in writers[2:])
            for writer in writers:
                writer.transport.abort()
            assert await exchange(to_active, b"eall") == b"all"


async def test_a_host_has_a_limited_number_of_connections(sshd: Sshd, pool: WorkerPool) -> None:
    async with serving(echo) as local, reversed_to(pool, sshd, TransportKind.SSHTUNNEL, local) as (_, (remote,)):
        opened = [await asyncio.open_connection("127.0.0.1", remote) for _ in range(MAX_CONNECTIONS)]
        for reader, writer in opened:
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
        with contextlib.suppress(ConnectionResetError):
            assert await exchange(remote, b"one too many") == b""
        for _reader, writer in opened[:2]:
            writer.close()
        for _ in range(100):  # the channels end a moment later
            with contextlib.suppress(ConnectionResetError):
                if await exchange(remote, b"again") == b"again":
                    break
        else:
            pytest.fail("no connection is free again")
        for _reader, writer in opened[2:]:
            writer.close()
