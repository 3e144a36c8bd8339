"""A tunnel's whole life as the mesh sees it, against a real OpenSSH sshd, over both transports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.errors import AuthRefused, ExecError, TunnelDown, TunnelError
from gpumesh.state import TunnelPhase
from gpumesh.topology import AddressCommand, BackendSpec, NodeSpec, Target, TransportKind
from gpumesh.tunnels.base import OutputStream
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from gpumesh.tunnels.lifecycle import Woke
from gpumesh.tunnels.supervisor import SshTunnel, open_tunnel, run_tunnel
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.parts import needs
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.sshd import Sshd, keygen, serving
from tests.tunnels.supervised import WatchedTunnel, descendants, descriptors, node, supervised, watched
from tests.tunnels.traffic import echo, exchange

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]

UP, BACKOFF, CONNECTING = TunnelPhase.UP, TunnelPhase.BACKOFF, TunnelPhase.CONNECTING
FAILED, CLOSED = TunnelPhase.FAILED, TunnelPhase.CLOSED
LONG_S = 600.0  # a keepalive interval in which nothing is noticed by it

both = pytest.mark.parametrize("transport", list(TransportKind))


@pytest.fixture(autouse=True)
def runtime(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sockets of transport openssh lie."""
    folder = tmp_path_factory.mktemp("r")
    folder.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


@pytest.fixture
async def sshd(tmp_path: Path) -> AsyncIterator[Sshd]:
    async with Sshd(tmp_path / "sshd", {"LogLevel": "INFO"}) as sshd:
        yield sshd


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    async with WorkerPool() as pool:
        yield pool


@pytest.fixture
async def backend() -> AsyncIterator[int]:
    async with serving(echo) as port:
        yield port


async def until_phase(one: WatchedTunnel, phase: TunnelPhase) -> None:
    await wait_until(lambda: one.phase is phase, f"{phase}; it is {one.tunnel.state}")


async def until_reconnected(one: WatchedTunnel, times: int) -> None:
    await wait_until(lambda: one.tunnel.state.reconnects == times and one.phase is UP, f"reconnect {times}")


# -- opening and closing ---------------------------------------------------------------------------------------------


@both
async def test_opens_forwards_runs_commands_and_leaves_nothing(
    sshd: Sshd, pool: WorkerPool, backend: int, runtime: Path, transport: TransportKind
) -> None:
    ssh = sshd.spec(transport=transport)
    async with supervised(pool, ssh, backend) as one:
        tunnel = one.tunnel
        await tunnel.wait_up()
        state = tunnel.state
        assert (state.transport, state.state, state.reconnects, state.last_error) == (transport.value, UP, 0, None)
        assert state.rtt_ms is not None
        assert state.since is not None
        (port,) = one.ports
        assert port == state.local_port
        assert tunnel.urls == {Target("127.0.0.1", backend): f"http://127.0.0.1:{port}"}
        assert await exchange(port, b"hello") == b"hello"
        result = await tunnel.exec(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout_s=20)
        assert (result.exit_status, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
        assert sshd.children()
    assert one.phases == [CONNECTING, UP, CLOSED]
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


async def test_what_the_block_raises_is_what_comes_out_of_running(sshd: Sshd, pool: WorkerPool) -> None:
    one = watched(pool, sshd.spec(), 1)

    async def fail() -> None:
        async with run_tunnel(one.tunnel):
            await one.tunnel.wait_up()
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    assert one.phase is CLOSED


# -- losing and finding ----------------------------------------------------------------------------------------------


@both
async def test_a_killed_session_reconnects_at_once_behind_the_same_port(
    sshd: Sshd, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    """By the reset alone: the keepalive would notice in ten minutes."""
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), backend) as one:
        await one.tunnel.wait_up()
        ports = one.ports
        for times in (1, 2, 3):
            sshd.kill_sessions()
            await until_reconnected(one, times)
            assert await exchange(ports[0], b"%d" % times) == b"%d" % times
        assert one.ports == ports
        assert one.has_passed(UP, BACKOFF, CONNECTING, UP)
        state = one.tunnel.state
        assert "broke" in (state.last_error or "")  # why it reconnected
        assert state.error_code is None  # but there is no error now
        assert FAILED not in one.phases


@both
async def test_an_sshd_that_is_away_is_waited_for(
    sshd: Sshd, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), backend, grace_s=60.0) as one:
        await one.tunnel.wait_up()
        await sshd.stop()
        await wait_until(lambda: one.tunnel.state.error_code == "connect-refused", "its absence noticed")
        waiting = asyncio.create_task(exchange(one.ports[0], b"patient"))
        state = one.tunnel.state
        assert state.state in (BACKOFF, CONNECTING)
        assert str(sshd.port) in (state.last_error or "")
        assert state.hint
        assert state.rtt_ms is None
        await wait_until(lambda: one.phase is BACKOFF, "its backoff")
        assert one.tunnel.state.retry_in_s is not None
        with pytest.raises(TunnelDown, match="nothing listens"):
            await one.tunnel.exec(["true"], timeout_s=5)
        assert not waiting.done()
        await sshd.start()
        assert await waiting == b"patient"
        await until_reconnected(one, 1)
        assert FAILED not in one.phases


@both
async def test_a_frozen_host_is_noticed_when_a_request_through_it_failed(
    sshd: Sshd, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), backend) as one:
        await one.tunnel.wait_up()
        assert await exchange(one.ports[0], b"x") == b"x"
        frozen = sshd.children()
        sshd.kill_sessions(signal.SIGSTOP)
        one.tunnel.suspect("a request failed")
        await wait_until(lambda: one.has_passed(UP, BACKOFF), "the loss noticed")
        assert one.tunnel.state.last_error is not None
        await until_reconnected(one, 1)
        assert await exchange(one.ports[0], b"y") == b"y"
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def test_suspecting_a_tunnel_that_lives_does_no_harm(sshd: Sshd, pool: WorkerPool, backend: int) -> None:
    async with supervised(pool, sshd.spec(keepalive_s=LONG_S), backend) as one:
        await one.tunnel.wait_up()
        # Each question that is answered is told of, with the round trip.
        await wait_until(lambda: len(one.states) >= 3, "the first round trip")
        before = len(one.states)
        for _ in range(100):
            one.tunnel.suspect("a request failed")
        await wait_until(lambda: len(one.states) > before, "the answer")
        assert one.phases == [CONNECTING, UP]


@pytest.mark.slow
@both
async def test_a_frozen_host_is_noticed_by_the_keepalive(
    sshd: Sshd, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    async with supervised(pool, sshd.spec(transport=transport), backend) as one:
        await one.tunnel.wait_up()
        frozen = sshd.children()
        sshd.kill_sessions(signal.SIGSTOP)
        await until_reconnected(one, 1)
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@both
async def test_a_worker_that_dies_or_hangs_is_replaced(
    sshd: Sshd, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), backend) as one:
        await one.tunnel.wait_up()
        assert pool.zygote_pid is not None

        def worker() -> int:
            children = Path(f"/proc/{pool.zygote_pid}/task/{pool.zygote_pid}/children").read_text().split()
            return int(children[-1])

        first = worker()
        os.kill(first, signal.SIGKILL)
        await until_reconnected(one, 1)
        second = worker()
        os.kill(second, signal.SIGSTOP)
        one.tunnel.suspect("a request timed out")
        await until_reconnected(one, 2)
        assert await exchange(one.ports[0], b"x") == b"x"
        await wait_until(lambda: not alive(first) and not alive(second), "the end of both")
        os.kill(pool.zygote_pid, signal.SIGKILL)
        await until_reconnected(one, 3)
        assert await exchange(one.ports[0], b"y") == b"y"


async def test_clients_are_turned_away_when_it_stays_away(sshd: Sshd, pool: WorkerPool, backend: int) -> None:
    async with supervised(pool, sshd.spec(keepalive_s=LONG_S), backend, grace_s=0.2) as one:
        await one.tunnel.wait_up()
        await sshd.stop()
        await wait_until(lambda: one.phase is not UP, "its absence noticed")
        for _ in range(2):  # one that waits, and one that comes when there is no waiting any more
            with pytest.raises(ConnectionResetError):
                await exchange(one.ports[0], b"x")
        await sshd.start()
        one.tunnel.retry_now()
        await until_phase(one, UP)
        assert await exchange(one.ports[0], b"back") == b"back"


async def test_a_cut_connection_is_reset_not_ended(sshd: Sshd, pool: WorkerPool, backend: int) -> None:
    """Nor when the host fell silent: half an answer must not look whole."""
    async with supervised(pool, sshd.spec(keepalive_s=LONG_S), backend) as one:
        await one.tunnel.wait_up()
        for times, sign in enumerate((signal.SIGKILL, signal.SIGSTOP), start=1):
            reader, writer = await asyncio.open_connection("127.0.0.1", one.ports[0])
            writer.write(b"half")
            assert await reader.readexactly(4) == b"half"
            sshd.kill_sessions(sign)
            one.tunnel.suspect("for the second case")
            async with asyncio.timeout(20):
                with pytest.raises(ConnectionResetError):
                    await reader.read()
            writer.close()
            await until_reconnected(one, times)


async def test_waking_up_gives_up_an_attempt_that_is_under_way(sshd: Sshd, pool: WorkerPool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        loop = asyncio.get_running_loop()
        silent.setblocking(False)
        spec = sshd.spec(port=silent.getsockname()[1], connect_timeout_s=60.0)
        async with supervised(pool, spec, 1) as one, asyncio.timeout(20):
            first, _ = await loop.sock_accept(silent)
            with first:
                first.setblocking(False)
                one.tunnel._feed(Woke())
                second, _ = await loop.sock_accept(silent)
                second.close()
                while await loop.sock_recv(first, 4096):  # its greeting, then the end
                    pass
            assert one.phases == [CONNECTING]


# -- a person must act -----------------------------------------------------------------------------------------------


@both
async def test_a_refused_key_is_failed_until_it_is_nudged(
    sshd: Sshd, pool: WorkerPool, backend: int, tmp_path: Path, transport: TransportKind
) -> None:
    right = sshd.authorized_keys.read_text()
    sshd.authorized_keys.write_text(keygen(tmp_path / "other").with_suffix(".pub").read_text())
    async with supervised(pool, sshd.spec(transport=transport), backend) as one:
        with pytest.raises(AuthRefused) as caught:
            await one.tunnel.wait_up()
        assert caught.value.node == "iceland"
        state = one.tunnel.state
        assert (state.state, state.error_code) == (FAILED, "auth-refused")
        assert state.retry_in_s is not None
        assert state.retry_in_s > 10
        assert state.hint
        with pytest.raises(ConnectionResetError):  # at once: this may last for days
            await exchange(one.ports[0], b"x")
        sshd.authorized_keys.write_text(right)
        one.tunnel.retry_now()
        await until_phase(one, UP)
        assert await exchange(one.ports[0], b"x") == b"x"
        assert one.phases == [CONNECTING, FAILED, CONNECTING, UP]


@both
async def test_a_changed_host_key_is_failed(sshd: Sshd, pool: WorkerPool, transport: TransportKind) -> None:
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), 1) as one:
        await one.tunnel.wait_up()
        other = keygen(sshd.folder / "another").with_suffix(".pub").read_text()
        sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {other}")
        sshd.kill_sessions()
        await until_phase(one, FAILED)
        assert one.tunnel.state.error_code == "host-key-changed"
        assert "trust" in (one.tunnel.state.hint or "")


@both
async def test_a_host_that_forbids_forwarding_is_failed(
    tmp_path: Path, pool: WorkerPool, backend: int, transport: TransportKind
) -> None:
    async with (
        Sshd(tmp_path / "no", {"AllowTcpForwarding": "no"}) as sshd,
        supervised(pool, sshd.spec(transport=transport), backend) as one,
    ):
        if transport is TransportKind.SSHTUNNEL:  # which learns it from the first client
            await one.tunnel.wait_up()
            with pytest.raises(ConnectionResetError):
                await exchange(one.ports[0], b"x")
        await until_phase(one, FAILED)
        assert one.tunnel.state.error_code == "forwarding-forbidden"
        assert "AllowTcpForwarding" in (one.tunnel.state.hint or "")


async def test_a_target_that_is_not_there_is_no_fault_of_the_tunnel(sshd: Sshd, pool: WorkerPool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    async with supervised(pool, sshd.spec(), port) as one:
        await one.tunnel.wait_up()
        with pytest.raises(ConnectionResetError):
            await exchange(one.ports[0], b"x")
        assert (await one.tunnel.exec(["true"], timeout_s=20)).exit_status == 0
        assert one.phases == [CONNECTING, UP]


async def test_a_missing_secret_is_failed_and_named(
    sshd: Sshd, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPUMESH_TEST_PASSWORD", raising=False)
    async with supervised(pool, sshd.spec(password_env="GPUMESH_TEST_PASSWORD"), 1) as one:
        with pytest.raises(TunnelError, match="GPUMESH_TEST_PASSWORD"):
            await one.tunnel.wait_up()
        assert one.tunnel.state.error_code == "secret-missing"


@both
async def test_a_person_is_asked_and_not_hurried(
    sshd: Sshd, pool: WorkerPool, tmp_path: Path, transport: TransportKind
) -> None:
    """Transport openssh asks for a key's passphrase; the other takes it from a variable only."""
    locked = keygen(tmp_path / "locked", passphrase="correct horse")
    sshd.authorized_keys.write_text(locked.with_suffix(".pub").read_text())
    asked: list[tuple[str, str, bool]] = []

    async def ask(node: str, text: str, *, echo: bool) -> str | None:
        asked.append((node, text, echo))
        await asyncio.sleep(1.5)  # more than the time that connecting may take
        return "correct horse"

    spec = sshd.spec(transport=transport, identity_files=(locked,), connect_timeout_s=1.0)
    async with supervised(pool, spec, 1, ask=ask) as one:
        if transport is TransportKind.OPENSSH:
            await one.tunnel.wait_up()
            assert len(asked) == 1
            assert asked[0][0] == "iceland"
            assert "locked" in asked[0][1]
            assert asked[0][2] is False
        else:
            with pytest.raises(TunnelError, match="passphrase"):
                await one.tunnel.wait_up()


@both
async def test_runpods_proxy_is_refused_by_its_name(sshd: Sshd, pool: WorkerPool, transport: TransportKind) -> None:
    """Also where a command gave it; nothing is sent to it."""
    async with supervised(pool, sshd.spec(host="ssh.runpod.io", transport=transport), 1) as one:
        with pytest.raises(TunnelError, match="terminals") as caught:
            await one.tunnel.wait_up()
        assert caught.value.code == "transport-unsupported"
        assert "exposed TCP" in (caught.value.hint or "")
        assert one.phase is FAILED
    asker = AddressCommand(("echo", "eu.ssh.runpod.io 22"))
    async with supervised(pool, sshd.spec(transport=transport, address_from=asker), 1) as one:
        with pytest.raises(TunnelError, match="terminals"):
            await one.tunnel.wait_up()


# -- an address from a command ---------------------------------------------------------------------------------------


@both
async def test_the_address_is_asked_for_again_when_a_connect_failed(
    sshd: Sshd, pool: WorkerPool, backend: int, tmp_path: Path, transport: TransportKind
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        dead = gone.getsockname()[1]
    answer, asked = tmp_path / "answer", tmp_path / "asked"
    answer.write_text("")  # the pod is still starting
    script = f"echo x >> {asked}; cat {answer}"
    ssh = sshd.spec(
        host="unused.invalid", transport=transport, address_from=AddressCommand(("sh", "-c", script)),
        keepalive_s=LONG_S,
    )  # fmt: skip
    async with supervised(pool, ssh, backend, grace_s=60.0) as one:
        await wait_until(lambda: one.tunnel.state.error_code == "host-unresolved", "the empty answer told")
        assert "address_from" in (one.tunnel.state.last_error or "")
        answer.write_text(f"127.0.0.1 {dead}\n")
        await wait_until(lambda: one.tunnel.state.error_code == "connect-refused", "the dead address told")
        answer.write_text(f'{{"host": "127.0.0.1", "port": {sshd.port}}}')
        await until_phase(one, UP)
        ports = one.ports
        assert await exchange(ports[0], b"x") == b"x"
        count = len(asked.read_text().split())
        assert count >= 3
        # The pod restarts: another port, the same key on record for the node.
        await sshd.stop()
        sshd.port = 0
        await sshd.start()
        answer.write_text(f"127.0.0.1:{sshd.port}")
        await wait_until(lambda: one.tunnel.state.reconnects == 1, "it is found at its new port")
        assert await exchange(ports[0], b"moved") == b"moved"
        assert len(asked.read_text().split()) > count
        assert FAILED not in one.phases


# -- commands --------------------------------------------------------------------------------------------------------


@both
async def test_streamed_output_comes_while_the_command_runs(
    sshd: Sshd, pool: WorkerPool, transport: TransportKind
) -> None:
    async with supervised(pool, sshd.spec(transport=transport), 1) as one:
        await one.tunnel.wait_up()
        pid = 0
        async with contextlib.aclosing(one.tunnel.exec_stream(["sh", "-c", "echo $$; sleep 600"])) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if chunk.stream is OutputStream.STDOUT:
                    pid = int(chunk.data)
                    break
            assert alive(pid)
        await wait_until(lambda: not alive(pid), "the command's end, when nobody reads on")
        chunks_of_all = [
            chunk
            async for chunk in one.tunnel.exec_stream(["sh", "-c", "echo a; exit 4"])
            if chunk.stream is OutputStream.STDOUT
        ]
        assert b"".join(chunk.data for chunk in chunks_of_all) == b"a\n"
        assert [(chunk.ended, chunk.exit_status) for chunk in chunks_of_all][-1] == (True, 4)


@both
async def test_a_command_in_time_out_or_cut_off(sshd: Sshd, pool: WorkerPool, transport: TransportKind) -> None:
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), 1) as one:
        await one.tunnel.wait_up()
        with pytest.raises(ExecError, match=r"within 0\.2 s"):
            await one.tunnel.exec(["sleep", "600"], timeout_s=0.2)
        cut = asyncio.create_task(one.tunnel.exec(["sh", "-c", "echo started >&2; sleep 600"], timeout_s=60))
        until_run = await one.tunnel.exec(["true"], timeout_s=20)  # by then the other has been sent
        assert until_run.exit_status == 0
        sshd.kill_sessions()
        with pytest.raises(ExecError, match="iceland"):
            await cut
        await until_reconnected(one, 1)
        truncated = await one.tunnel.exec(["head", "-c", "100000", "/dev/zero"], timeout_s=20, limit_bytes=1000)
        assert (len(truncated.stdout), truncated.truncated) == (1000, True)


# -- cancelling ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@both
async def test_cancelling_at_any_moment_leaves_nothing(
    sshd: Sshd, backend: int, runtime: Path, transport: TransportKind
) -> None:
    rng = random.Random(20261124)
    ssh = sshd.spec(transport=transport)
    asker = replace(ssh, address_from=AddressCommand((sys.executable, "-c", f"print('127.0.0.1', {sshd.port})")))
    before = descriptors()
    async with WorkerPool() as pool:
        await pool.prestart()
        for attempt in range(24):
            one = watched(pool, asker if attempt % 3 == 0 else ssh, backend)
            task = asyncio.create_task(one.tunnel.run())
            # From its first step to some time after it is up.
            await asyncio.sleep(rng.choice((0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.4)) * rng.random())
            if attempt % 4 == 0 and one.phase is UP:
                sshd.kill_sessions()  # and while it falls
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert one.phase is CLOSED
        zygote = pool.zygote_pid
        assert zygote is not None
        await wait_until(lambda: not descendants(zygote), "the end of all workers")
        await wait_until(lambda: not sshd.children(), "the end of all sessions")
        assert list(runtime.glob("gpumesh/*")) == []
    await wait_until(lambda: descriptors() == before, f"all descriptors closed: {set(descriptors()) - set(before)}")
    assert set(descendants(os.getpid())) == {sshd.process.pid if sshd.process else 0}
