"""Which users of this machine can use the local ends of a tunnel: real processes of other users, a real sshd, both
transports."""

from __future__ import annotations

import asyncio
import logging
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from gpumesh.errors import TunnelError
from gpumesh.state import LocalAccess, TunnelPhase
from gpumesh.topology import Target, TransportKind, TunnelListen, TunnelsSpec
from gpumesh.tunnels import listeners
from gpumesh.tunnels.inprocess import channel_multiplexer
from gpumesh.tunnels.local_system import peer_users
from gpumesh.tunnels.transport import ConnectRequest
from gpumesh.tunnels.transports import load_connect
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.prerequisites import needs
from tests.tunnels.inprocess.connecting import connected
from tests.tunnels.other_user import ANOTHER, NOBODY, connect_as
from tests.tunnels.polling import wait_until
from tests.tunnels.recorded_events import RecordedEvents
from tests.tunnels.sshd import Sshd, listener, serving
from tests.tunnels.supervised import WatchedTunnel, descriptors, make_watched, supervised
from tests.tunnels.traffic import echo, exchange

pytestmark = [
    pytest.mark.real,
    needs("sshd", "ssh"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which identifies peers"),
]

both = pytest.mark.parametrize("transport", list(TransportKind))
SHARED = TunnelsSpec(share=True)
UNIX = TunnelsSpec(listen=TunnelListen.UNIX)


@pytest.fixture(autouse=True)
def runtime(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short path, because the path of a Unix socket has a limit."""
    folder = tmp_path_factory.mktemp("r")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


class CountingBackend:
    """A backend that counts its connections."""

    def __init__(self) -> None:
        self.connections = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await echo(reader, writer)


# -- ports -----------------------------------------------------------------------------------------------------------


@needs("root")
@both
async def test_a_port_serves_its_own_user_and_resets_others(
    sshd: Sshd, pool: WorkerPool, transport: TransportKind, caplog: pytest.LogCaptureFixture
) -> None:
    backend = CountingBackend()
    async with serving(backend) as port, supervised(pool, sshd.spec(transport=transport), port) as watched:
        await watched.tunnel.wait_up()
        (local,) = watched.ports
        assert watched.tunnel.state.local_access is LocalAccess.OWN_USER
        assert await exchange(local, b"hello") == b"hello"
        assert await connect_as(local, uid=0) == "answer hello"
        before = backend.connections
        with caplog.at_level(logging.WARNING, "gpumesh"):
            for way in ("ipv4", "mapped"):
                for uid in (NOBODY, ANOTHER):
                    assert await connect_as(local, uid=uid, way=way) == "reset"
            await wait_until(lambda: len(caplog.messages) >= 2, "both users reported")
        assert backend.connections == before
        message_of_nobody, message_of_another = caplog.messages  # each user once, though each tried twice
        assert (
            f"nobody (uid {NOBODY}) tried to connect to port {local}, the local end of iceland's tunnel"
            in message_of_nobody
        )
        assert "share: true" in message_of_nobody
        assert f"user uid {ANOTHER} tried" in message_of_another
        assert await exchange(local, b"still") == b"still"


@needs("root")
@both
async def test_shared_ports_serve_all_users(sshd: Sshd, pool: WorkerPool, transport: TransportKind) -> None:
    async with (
        serving(echo) as port,
        supervised(pool, sshd.spec(transport=transport), port, tunnels=SHARED) as watched,
    ):
        await watched.tunnel.wait_up()
        assert watched.tunnel.state.local_access is LocalAccess.ANY_USER
        assert await connect_as(watched.ports[0], uid=ANOTHER) == "answer hello"


@needs("root")
@both
async def test_waiting_clients_are_checked_when_the_tunnel_is_up(
    sshd: Sshd, pool: WorkerPool, transport: TransportKind
) -> None:
    backend = CountingBackend()
    async with serving(backend) as port:
        watched = make_watched(pool, sshd.spec(transport=transport), port)
        (local,) = watched.ports
        early = [asyncio.create_task(connect_as(local, uid=uid)) for uid in (0, ANOTHER)]
        gone = await connect_as(
            local, uid=ANOTHER, way="goes"
        )  # it is still in the queue, and for the kernel it has uid 0 by now
        assert gone == ""
        running = asyncio.create_task(watched.tunnel.run())
        try:
            assert await asyncio.gather(*early) == ["answer hello", "reset"]
            assert await exchange(local, b"last") == b"last"
            checks = 1 if transport is TransportKind.OPENSSH else 0  # it checks whether forwarding is allowed
            assert backend.connections == 2 + checks
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@needs("root")
@both
async def test_a_client_that_has_gone_reaches_nothing(sshd: Sshd, pool: WorkerPool, transport: TransportKind) -> None:
    """For the kernel a socket without a process has the uid of root."""
    backend = CountingBackend()
    async with serving(backend) as port, supervised(pool, sshd.spec(transport=transport), port) as watched:
        await watched.tunnel.wait_up()
        (local,) = watched.ports
        assert await exchange(local, b"hello") == b"hello"
        before = backend.connections
        await asyncio.gather(*(connect_as(local, uid=ANOTHER, way="goes") for _ in range(20)))
        assert await exchange(local, b"hello") == b"hello"
        assert backend.connections == before + 1


@needs("root")
async def test_sshtunnels_own_forwarding_refuses_other_users_too(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_multiplexer, "find_missing_feature", lambda _: "for this test")
    events = RecordedEvents()
    backend = CountingBackend()
    async with serving(backend) as port, connected(sshd.spec(), port, events=events) as (connection, (local,)):
        assert connection._forwarder is not None
        assert not connection._forwarder.uses_channels
        assert await exchange(local, b"hello") == b"hello"
        before = backend.connections
        assert await connect_as(local, uid=ANOTHER) == "reset"
        assert await connect_as(local, uid=0) == "answer hello"
        assert events.refused_peers == [(local, ANOTHER)]
        assert backend.connections == before + 1


@both
async def test_a_worker_that_cannot_identify_peers_does_not_serve(
    sshd: Sshd, transport: TransportKind, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peer_users, "open_socket_lookup", lambda _: None)
    before = descriptors()
    with listener() as local:
        setup = ConnectRequest(
            "n", sshd.spec(transport=transport), (Target("127.0.0.1", 1),), control_dir=str(tmp_path)
        )
        with pytest.raises(TunnelError, match="cannot be told"):
            await load_connect(transport)(setup, [local], RecordedEvents())
    await wait_until(lambda: not sshd.children(), "the end of the session")
    await wait_until(lambda: descriptors() == before, "nothing is left open")


@needs("root")
async def test_the_sockets_of_ssh_refuse_other_users(
    sshd: Sshd, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transport openssh: the master's control socket, and the sockets at which it forwards."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o711)
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        ssh = sshd.spec(transport=TransportKind.OPENSSH)
        async with serving(echo) as port, supervised(pool, ssh, port, tunnels=SHARED) as watched:
            await watched.tunnel.wait_up()
            inner = Path(folder) / "gpumesh"
            inner.chmod(0o711)
            sockets = [path for path in inner.rglob("*") if path.is_socket()]
            assert len(sockets) == 2
            for path in sockets:
                assert await connect_as(str(path), uid=ANOTHER, way="unix") == "PermissionError"
                path.parent.chmod(0o711)
                assert await connect_as(str(path), uid=ANOTHER, way="unix") == "PermissionError"
                path.parent.chmod(0o700)


def test_access_is_unchecked_where_the_system_does_not_identify_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "can_identify_peers", lambda _: False)
    watched = listeners.Listeners([Target("127.0.0.1", 1)])
    assert watched.access is LocalAccess.UNCHECKED
    watched.close()


# -- Unix sockets ----------------------------------------------------------------------------------------------------


def local_socket(watched: WatchedTunnel) -> str:
    path = watched.tunnel.state.local_socket
    assert path is not None
    return path


@both
async def test_a_unix_socket_in_place_of_a_port(
    sshd: Sshd, pool: WorkerPool, runtime: Path, transport: TransportKind
) -> None:
    async with (
        serving(echo) as port,
        supervised(pool, sshd.spec(transport=transport), port, 1, tunnels=UNIX) as watched,
    ):
        await watched.tunnel.wait_up()
        state = watched.tunnel.state
        path = runtime / "gpumesh" / "home-iceland.sock"
        assert (state.local_port, state.local_socket, state.local_access) == (None, str(path), LocalAccess.OWN_USER)
        assert list(watched.tunnel.urls.values()) == [
            f"http://unix:{path}:",
            f"http://unix:{path.with_stem(path.stem + '-2')}:",
        ]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"hello")
        assert await asyncio.wait_for(reader.readexactly(5), 20) == b"hello"
        sshd.kill_sessions()
        await wait_until(
            lambda: watched.tunnel.state.reconnects == 1 and watched.phase is TunnelPhase.UP, "the reconnect"
        )
        assert await asyncio.wait_for(reader.read(), 20) == b""  # a Unix socket has no reset to send
        writer.close()
        assert await connect_as(str(path), uid=0, way="unix") == "answer hello"
    assert not list(path.parent.iterdir())


@needs("root")
async def test_a_unix_socket_refuses_other_users(sshd: Sshd, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o711)  # so that only our folder inside it keeps others out
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        async with serving(echo) as port, supervised(pool, sshd.spec(), port, tunnels=UNIX) as watched:
            await watched.tunnel.wait_up()
            path = local_socket(watched)
            assert await connect_as(path, uid=ANOTHER, way="unix") == "PermissionError"
            Path(path).parent.chmod(0o711)
            assert await connect_as(path, uid=ANOTHER, way="unix") == "PermissionError"


async def test_clients_of_a_unix_socket_wait_and_are_reset(sshd: Sshd, pool: WorkerPool) -> None:
    """Like clients of a port: they wait during a short outage, and are reset during a long one."""
    async with serving(echo) as port:
        watched = make_watched(pool, sshd.spec(), port, tunnels=UNIX, client_wait_s=0.2)
        waiting = asyncio.create_task(connect_as(local_socket(watched), uid=0, way="unix"))
        await sshd.stop()
        running = asyncio.create_task(watched.tunnel.run())
        try:
            assert await waiting in ("reset", "answer")
            await sshd.start()
            watched.tunnel.retry_now()
            await watched.tunnel.wait_up()
            assert await connect_as(local_socket(watched), uid=0, way="unix") == "answer hello"
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
