"""A node without SSH, with real servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field

import pytest

from gpumesh.errors import ExecError, TunnelDown
from gpumesh.state import TunnelPhase, TunnelState
from gpumesh.topology import BackendSpec, NodeSpec, Target
from gpumesh.tunnels.base import ExecChunk, OutputStream
from gpumesh.tunnels.direct.port_owners import HostPort, PortOwner, PortOwnerLookup
from gpumesh.tunnels.direct.this_machine import ThisMachine
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.sshd import serving
from tests.tunnels.supervised import descriptors
from tests.tunnels.traffic import echo

HERE, ELSEWHERE = PortOwner(True), PortOwner(False, "ssh listens on port 1, which may lead to another machine")


class FixedOwners(PortOwnerLookup):
    """Returns the same owner for each port."""

    def __init__(self, owner: PortOwner) -> None:
        super().__init__()
        self._owner = owner

    def find_owners(self, addresses: Collection[HostPort]) -> dict[HostPort, PortOwner]:
        return dict.fromkeys(addresses, self._owner)


@dataclass
class RunningTunnel:
    tunnel: DirectTunnel
    states: list[TunnelState] = field(default_factory=list)


@contextlib.asynccontextmanager
async def direct(*targets: Target, owner: PortOwner = HERE) -> AsyncIterator[RunningTunnel]:
    states: list[TunnelState] = []
    spec = NodeSpec("local", BackendSpec(targets=targets))
    tunnel = DirectTunnel(
        spec, clock=time.monotonic, on_change=states.append, this_machine=ThisMachine(FixedOwners(owner))
    )
    task = asyncio.create_task(tunnel.run())
    try:
        yield RunningTunnel(tunnel, states)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def find_closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def test_up_while_one_of_its_targets_answers() -> None:
    dead = Target("127.0.0.1", find_closed_port())
    async with serving(echo) as port, direct(dead, Target("localhost", port, path="/api/")) as running:
        await asyncio.wait_for(running.tunnel.wait_up(), 20)
        state = running.tunnel.state
        assert (state.transport, state.state, state.error_code, state.local_port) == (
            "direct",
            TunnelPhase.UP,
            None,
            None,
        )
        assert state.rtt_ms is not None
        assert repr(running.tunnel) == "<DirectTunnel local UP 1 targets answer>"
        assert running.tunnel.urls[Target("localhost", port, path="/api/")] == f"http://localhost:{port}/api"
    assert running.tunnel.state.state is TunnelPhase.CLOSED
    with pytest.raises(TunnelDown):
        await running.tunnel.wait_up()


async def test_suspect_finds_a_loss_and_retry_now_finds_the_return() -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        running = await stack.enter_async_context(direct(Target("127.0.0.1", port)))
        await asyncio.wait_for(running.tunnel.wait_up(), 20)
        server.close()
        await server.wait_closed()
        running.tunnel.suspect("a request failed")
        await wait_until(lambda: running.tunnel.state.state is TunnelPhase.BACKOFF, "the loss")
        state = running.tunnel.state
        assert state.error_code == "connect-refused"
        assert str(port) in (state.last_error or "")
        assert state.hint
        assert state.retry_in_s
        with pytest.raises(TunnelDown):
            await running.tunnel.exec(["true"], timeout_s=5)
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
        async with server:
            running.tunnel.retry_now()
            await asyncio.wait_for(running.tunnel.wait_up(), 20)
            state = running.tunnel.state
            assert state.reconnects == 1
            assert state.last_error  # why it was away
            assert state.error_code is None


@pytest.mark.parametrize(
    ("target", "code"),
    [
        (Target("gpumesh-no-such-host.invalid", 80), "host-unresolved"),
        (Target("a" * 300, 80), "host-unresolved"),
        (Target("a..b", 80), "host-unresolved"),
        (Target("127.0.0.1", find_closed_port()), "connect-refused"),
        (Target("255.255.255.255", 80), "host-unreachable"),  # our own kernel refuses it: nothing is sent
    ],
)
async def test_error_codes(target: Target, code: str) -> None:
    async with direct(target) as running:
        await wait_until(lambda: running.tunnel.state.error_code is not None, "a reason")
        assert running.tunnel.state.error_code == code


@pytest.mark.slow
async def test_a_target_that_never_answers_times_out_and_delays_no_other() -> None:
    """A listener with a full queue drops further connections."""
    with socket.socket() as hole, contextlib.ExitStack() as stack:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        port = hole.getsockname()[1]
        for _ in range(4):
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filling.connect(("127.0.0.1", port))
        async with direct(Target("127.0.0.1", port)) as running:
            await wait_until(lambda: running.tunnel.state.error_code == "connect-timeout", "the time-out")
        async with serving(echo) as good, direct(Target("127.0.0.1", port), Target("127.0.0.1", good)) as running:
            await asyncio.wait_for(running.tunnel.wait_up(), 20)


# -- commands --------------------------------------------------------------------------------------------------------


async def test_commands_run_here_if_the_server_is_here() -> None:
    async with serving(echo) as port, direct(Target("127.0.0.1", port)) as running:
        await running.tunnel.wait_up()
        result = await running.tunnel.exec(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout_s=20)
        assert (result.exit_status, result.stdout, result.stderr, result.truncated) == (3, b"out\n", b"err\n", False)
        assert (await running.tunnel.exec(["echo", "$HOME; id"], timeout_s=20)).stdout == b"$HOME; id\n"  # no shell
        assert (await running.tunnel.exec(["sh", "-c", "kill -9 $$"], timeout_s=20)).exit_status is None
        cut = await running.tunnel.exec(["head", "-c", "100000", "/dev/zero"], timeout_s=20, limit_bytes=10)
        assert (cut.stdout, cut.truncated) == (bytes(10), True)
        with pytest.raises(ExecError, match="not installed"):
            await running.tunnel.exec(["gpumesh-no-such-command"], timeout_s=20)
        with pytest.raises(ExecError, match="cannot be run"):
            await running.tunnel.exec(["/"], timeout_s=20)


async def test_commands_do_not_run_for_a_server_elsewhere() -> None:
    async with serving(echo) as port:
        async with direct(Target("127.0.0.1", port), owner=ELSEWHERE) as running:
            await running.tunnel.wait_up()
            with pytest.raises(ExecError, match="another machine") as caught:
                await running.tunnel.exec(["true"], timeout_s=5)
            assert "ssh:" in (caught.value.hint or "")
            with pytest.raises(ExecError, match="another machine"):
                await anext(running.tunnel.exec_stream(["true"]))
        name = socket.gethostname()
        async with serving(echo, host="0.0.0.0") as open_port, direct(Target(name, open_port)) as running:
            try:
                await asyncio.wait_for(running.tunnel.wait_up(), 5)
            except TimeoutError:
                pytest.skip("this machine does not know its own name")
            with pytest.raises(ExecError, match="not on this machine"):
                await running.tunnel.exec(["true"], timeout_s=5)


async def test_a_command_that_does_not_end_is_ended() -> None:
    before = descriptors()
    async with serving(echo) as port, direct(Target("127.0.0.1", port)) as running:
        await running.tunnel.wait_up()
        with pytest.raises(ExecError, match=r"within 0\.2 s"):
            await running.tunnel.exec(["sleep", "600"], timeout_s=0.2)
        pid = 0
        stream = running.tunnel.exec_stream(["sh", "-c", "echo $$; exec sleep 600"])
        async for chunk in stream:
            pid = int(chunk.data)
            break
        await stream.aclose()  # type: ignore[attr-defined]
        await wait_until(lambda: not alive(pid), "the command's end, after the iterator is closed")
    await wait_until(lambda: descriptors() == before, "all descriptors closed")


async def test_a_stream_has_all_output_and_the_status() -> None:
    async with serving(echo) as port, direct(Target("127.0.0.1", port)) as running:
        await running.tunnel.wait_up()
        chunks: list[ExecChunk] = []
        async for chunk in running.tunnel.exec_stream(["sh", "-c", "head -c 3000000 /dev/zero; echo err >&2; exit 5"]):
            chunks.append(chunk)
        assert sum(len(chunk.data) for chunk in chunks if chunk.stream is OutputStream.STDOUT) == 3_000_000
        assert b"".join(chunk.data for chunk in chunks if chunk.stream is OutputStream.STDERR) == b"err\n"
        assert (chunks[-1].ended, chunks[-1].exit_status) == (True, 5)
