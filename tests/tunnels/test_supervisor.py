"""A tunnel's whole life as the mesh sees it, against a real OpenSSH sshd, over both transports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.errors import TunnelDown
from gpumesh.topology import AddressCommand, BackendSpec, NodeSpec, Target, TransportKind
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from gpumesh.tunnels.lifecycle import Woke
from gpumesh.tunnels.supervisor import SshTunnel, open_tunnel, run_tunnel
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.prerequisites import needs
from tests.tunnels.kept_zygote import KeptZygote
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.sshd import Sshd
from tests.tunnels.supervised import (
    BACKOFF,
    CLOSED,
    CONNECTING,
    FAILED,
    LONG_S,
    UP,
    both,
    descendants,
    descriptors,
    make_watched,
    node,
    supervised,
    wait_phase,
    wait_reconnects,
)
from tests.tunnels.traffic import exchange

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]


# -- opening and closing ---------------------------------------------------------------------------------------------


@both
async def test_opens_forwards_runs_commands_and_leaves_nothing(
    sshd: Sshd, pool: WorkerPool, backend: int, runtime: Path, transport: TransportKind
) -> None:
    ssh = sshd.spec(transport=transport)
    async with supervised(pool, ssh, backend) as watched:
        tunnel = watched.tunnel
        await tunnel.wait_up()
        state = tunnel.state
        assert (state.transport, state.state, state.reconnects, state.last_error) == (transport.value, UP, 0, None)
        assert state.rtt_ms is not None
        assert state.since is not None
        (port,) = watched.ports
        assert port == state.local_port
        assert tunnel.urls == {Target("127.0.0.1", backend): f"http://127.0.0.1:{port}"}
        assert await exchange(port, b"hello") == b"hello"
        result = await tunnel.exec(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout_s=20)
        assert (result.exit_status, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
        assert sshd.children()
        assert repr(tunnel) == "<SshTunnel iceland UP 0 reconnects>"
    assert watched.phases == [CONNECTING, UP, CLOSED]
    with pytest.raises(ConnectionRefusedError):
        await exchange(port, b"closed")
    await wait_until(lambda: not sshd.children(), "the end of sshd's session")
    assert pool.zygote_pid is not None
    await wait_until(lambda: not descendants(pool.zygote_pid or 0), "the end of the worker")
    assert list(runtime.glob("gpumesh/*")) == []
    with pytest.raises(TunnelDown):
        await tunnel.wait_up()
    with pytest.raises(TunnelDown):
        await tunnel.exec(["true"], timeout_s=5)


async def test_open_tunnel_chooses_by_the_node(sshd: Sshd, pool: WorkerPool) -> None:
    made = open_tunnel(node(sshd.spec(), 1), workers=pool, on_change=lambda _: None)
    assert isinstance(made, SshTunnel)
    made.close()
    made = open_tunnel(NodeSpec("local", BackendSpec()), workers=pool, on_change=lambda _: None)
    assert isinstance(made, DirectTunnel)


async def test_run_tunnel_raises_the_exception_of_its_block(sshd: Sshd, pool: WorkerPool) -> None:
    watched = make_watched(pool, sshd.spec(), 1)

    async def fail() -> None:
        async with run_tunnel(watched.tunnel):
            await watched.tunnel.wait_up()
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    assert watched.phase is CLOSED


# -- losses and reconnects --------------------------------------------------------------------------------------------


@both
async def test_a_killed_session_reconnects_at_once_and_keeps_the_port(
    sshd: Sshd, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    """The reset alone is noticed: the keepalive would come in ten minutes."""
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), backend) as watched:
        await watched.tunnel.wait_up()
        ports = watched.ports
        for times in (1, 2, 3):
            sshd.kill_sessions()
            await wait_reconnects(watched, times)
            assert await exchange(ports[0], b"%d" % times) == b"%d" % times
        assert watched.ports == ports
        assert watched.has_passed(UP, BACKOFF, CONNECTING, UP)
        state = watched.tunnel.state
        assert "broke" in (state.last_error or "")  # why it reconnected
        assert state.error_code is None  # but there is no error now
        assert FAILED not in watched.phases


@both
async def test_clients_wait_while_the_sshd_is_down(
    sshd: Sshd, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    async with supervised(
        pool, sshd.spec(transport=transport, keepalive_s=LONG_S), backend, client_wait_s=60.0
    ) as watched:
        await watched.tunnel.wait_up()
        await sshd.stop()
        await wait_until(lambda: watched.tunnel.state.error_code == "connect-refused", "the loss noticed")
        waiting = asyncio.create_task(exchange(watched.ports[0], b"patient"))
        state = watched.tunnel.state
        assert state.state in (BACKOFF, CONNECTING)
        assert str(sshd.port) in (state.last_error or "")
        assert state.hint
        assert state.rtt_ms is None
        await wait_until(lambda: watched.phase is BACKOFF, "the backoff")
        assert watched.tunnel.state.retry_in_s is not None
        with pytest.raises(TunnelDown, match="nothing listens"):
            await watched.tunnel.exec(["true"], timeout_s=5)
        assert not waiting.done()
        await sshd.start()
        assert await waiting == b"patient"
        await wait_reconnects(watched, 1)
        assert FAILED not in watched.phases


@both
async def test_a_frozen_host_is_noticed_when_a_request_through_it_failed(
    sshd: Sshd, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), backend) as watched:
        await watched.tunnel.wait_up()
        assert await exchange(watched.ports[0], b"x") == b"x"
        frozen = sshd.children()
        sshd.kill_sessions(signal.SIGSTOP)
        watched.tunnel.suspect("a request failed")
        await wait_until(lambda: watched.has_passed(UP, BACKOFF), "the loss noticed")
        assert watched.tunnel.state.last_error is not None
        await wait_reconnects(watched, 1)
        assert await exchange(watched.ports[0], b"y") == b"y"
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def test_suspecting_a_healthy_tunnel_changes_nothing(sshd: Sshd, pool: WorkerPool, backend: int) -> None:
    async with supervised(pool, sshd.spec(keepalive_s=LONG_S), backend) as watched:
        await watched.tunnel.wait_up()
        # Each answered ping is announced with its round trip.
        await wait_until(lambda: len(watched.states) >= 3, "the first round trip")
        before = len(watched.states)
        for _ in range(100):
            watched.tunnel.suspect("a request failed")
        await wait_until(lambda: len(watched.states) > before, "the answer")
        assert watched.phases == [CONNECTING, UP]


@pytest.mark.slow
@both
async def test_a_frozen_host_is_noticed_by_the_keepalive(
    sshd: Sshd, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    async with supervised(pool, sshd.spec(transport=transport), backend) as watched:
        await watched.tunnel.wait_up()
        frozen = sshd.children()
        sshd.kill_sessions(signal.SIGSTOP)
        await wait_reconnects(watched, 1)
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@both
async def test_a_worker_that_dies_or_hangs_is_replaced(
    sshd: Sshd, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), backend) as watched:
        await watched.tunnel.wait_up()
        assert pool.zygote_pid is not None

        def worker() -> int:
            children = Path(f"/proc/{pool.zygote_pid}/task/{pool.zygote_pid}/children").read_text().split()
            return int(children[-1])

        first = worker()
        os.kill(first, signal.SIGKILL)
        await wait_reconnects(watched, 1)
        second = worker()
        os.kill(second, signal.SIGSTOP)
        watched.tunnel.suspect("a request timed out")
        await wait_reconnects(watched, 2)
        assert await exchange(watched.ports[0], b"x") == b"x"
        await wait_until(lambda: not alive(first) and not alive(second), "the end of both")
        os.kill(pool.zygote_pid, signal.SIGKILL)
        await wait_reconnects(watched, 3)
        assert await exchange(watched.ports[0], b"y") == b"y"


async def test_clients_are_reset_during_a_long_outage(sshd: Sshd, pool: WorkerPool, backend: int) -> None:
    async with supervised(pool, sshd.spec(keepalive_s=LONG_S), backend, client_wait_s=0.2) as watched:
        await watched.tunnel.wait_up()
        await sshd.stop()
        await wait_until(lambda: watched.phase is not UP, "the loss noticed")
        for _ in range(2):  # a client that waits, and a client that comes while clients are reset
            with pytest.raises(ConnectionResetError):
                await exchange(watched.ports[0], b"x")
        await sshd.start()
        watched.tunnel.retry_now()
        await wait_phase(watched, UP)
        assert await exchange(watched.ports[0], b"back") == b"back"


async def test_clients_of_a_cut_connection_are_reset(sshd: Sshd, pool: WorkerPool, backend: int) -> None:
    """Also when the host does not answer any more: half an answer must not look like a whole one."""
    async with supervised(pool, sshd.spec(keepalive_s=LONG_S), backend) as watched:
        await watched.tunnel.wait_up()
        for times, sign in enumerate((signal.SIGKILL, signal.SIGSTOP), start=1):
            reader, writer = await asyncio.open_connection("127.0.0.1", watched.ports[0])
            writer.write(b"half")
            assert await reader.readexactly(4) == b"half"
            sshd.kill_sessions(sign)
            watched.tunnel.suspect("for the second case")
            async with asyncio.timeout(20):
                with pytest.raises(ConnectionResetError):
                    await reader.read()
            writer.close()
            await wait_reconnects(watched, times)


async def test_a_wake_restarts_an_attempt_under_way(sshd: Sshd, pool: WorkerPool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        loop = asyncio.get_running_loop()
        silent.setblocking(False)
        spec = sshd.spec(port=silent.getsockname()[1], connect_timeout_s=60.0)
        async with supervised(pool, spec, 1) as watched, asyncio.timeout(20):
            first, _ = await loop.sock_accept(silent)
            with first:
                first.setblocking(False)
                watched.tunnel._handle_event(Woke())
                second, _ = await loop.sock_accept(silent)
                with second:  # closed after the phases were looked at: its end is a failure
                    while await loop.sock_recv(first, 4096):  # paramiko's greeting, then the end
                        pass
                    assert watched.phases == [CONNECTING]


# -- cancelling ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@both
async def test_cancelling_at_any_moment_leaves_nothing(
    sshd: Sshd, backend: int, runtime: Path, transport: TransportKind, kept_zygote: KeptZygote
) -> None:
    kept_zygote.end()
    rng = random.Random(20261124)
    ssh = sshd.spec(transport=transport)
    asker = replace(ssh, address_from=AddressCommand((sys.executable, "-c", f"print('127.0.0.1', {sshd.port})")))
    before = descriptors()
    async with WorkerPool() as pool:
        await pool.prestart()
        for attempt in range(24):
            watched = make_watched(pool, asker if attempt % 3 == 0 else ssh, backend)
            task = asyncio.create_task(watched.tunnel.run())
            # At any moment from the first step until some time after the tunnel is up.
            await asyncio.sleep(rng.choice((0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.4)) * rng.random())
            if attempt % 4 == 0 and watched.phase is UP:
                sshd.kill_sessions()  # cancelled while the loss is being handled
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert watched.phase is CLOSED
        zygote = pool.zygote_pid
        assert zygote is not None
        await wait_until(lambda: not descendants(zygote), "the end of all workers")
        await wait_until(lambda: not sshd.children(), "the end of all sessions")
        assert list(runtime.glob("gpumesh/*")) == []
    await wait_until(lambda: descriptors() == before, f"all descriptors closed: {set(descriptors()) - set(before)}")
    assert set(descendants(os.getpid())) == {sshd.process.pid if sshd.process else 0}
