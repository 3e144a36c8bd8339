"""Kills the connection of one supervised tunnel again and again while it is used, and compares the resources of the
mesh's process and of the zygote before and after. test_chaos_cycles.py runs a few cycles, benchmarks/cycles.py many."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpumesh.errors import ExecError, TunnelDown
from gpumesh.state import TunnelPhase
from gpumesh.topology import BackendSpec, NodeSpec, Target, TransportKind
from gpumesh.tunnels.base import Tunnel
from gpumesh.tunnels.supervisor import open_tunnel, run_tunnel
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.real import process_resources
from tests.real.process_resources import ProcessResources
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import Sshd, serving

CONNECTIONS = 4  # through the tunnel, at the moment of each kill
SETTLE_S = 5.0


@dataclass(frozen=True)
class Snapshot:
    """The resources of the mesh's process, and of the zygote that forks the workers."""

    mesh: ProcessResources
    zygote: ProcessResources

    @property
    def countable(self) -> tuple[int, ...]:
        return (*self.mesh.countable, *self.zygote.countable)


@dataclass(frozen=True)
class CycleReport:
    """``before`` is taken after the warm-up. ``ports``: the local ports that the tunnel had. ``leftover_files``: files
    in the runtime folder at the end."""

    transport: str
    count: int
    seconds: float
    before: Snapshot
    after: Snapshot
    ports: frozenset[int]
    reconnects: int
    leftover_files: tuple[str, ...]


async def run_cycles(
    folder: Path, runtime: Path, transport: TransportKind, *, cycles: int, warm_up: int, progress: Callable[[int], None]
) -> CycleReport:
    """``runtime``: what XDG_RUNTIME_DIR is. Raises AssertionError when a cycle does not do what it should."""
    async with Sshd(folder / "sshd", {"LogLevel": "ERROR"}) as sshd, serving(_echo) as target, WorkerPool() as workers:
        spec = NodeSpec(
            "churned", BackendSpec(targets=(Target("127.0.0.1", target),)), ssh=sshd.spec(transport=transport)
        )
        async with run_tunnel(open_tunnel(spec, workers=workers, on_change=lambda _: None)) as tunnel:
            for _ in range(warm_up):
                await _run_cycle(tunnel, sshd)
                gc.collect()
            await tunnel.wait_up()
            before = await _wait_settled(None)
            reconnects = tunnel.state.reconnects
            ports = set()
            started_at = time.monotonic()
            for number in range(cycles):
                ports.add(await _run_cycle(tunnel, sshd))
                # Otherwise the garbage that waits for a collection is measured as well: up to 1 MiB.
                gc.collect()
                progress(number + 1)
            seconds = time.monotonic() - started_at
            await tunnel.wait_up()
            after = await _wait_settled(before)
            reconnects = tunnel.state.reconnects - reconnects
    leftovers = tuple(str(path.relative_to(runtime)) for path in runtime.rglob("*") if not path.is_dir())
    return CycleReport(transport.value, cycles, seconds, before, after, frozenset(ports), reconnects, leftovers)


async def _run_cycle(tunnel: Tunnel, sshd: Sshd) -> int:
    """Uses the tunnel, kills its connection, waits for the loss, and asks for a retry. Returns the local port."""
    await tunnel.wait_up()
    port = tunnel.state.local_port
    assert port is not None
    streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)]
    for number, (reader, writer) in enumerate(streams):
        writer.write(b"%d" % number)
        async with asyncio.timeout(SETTLE_S):
            assert await reader.readexactly(1) == b"%d" % number
    command = asyncio.create_task(_run_endless_command(tunnel))
    await asyncio.sleep(0)
    sshd.kill_sessions()
    await wait_until(lambda: tunnel.state.state is not TunnelPhase.UP, "the kill noticed")
    async with asyncio.timeout(SETTLE_S):
        for reader, writer in streams:
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b"", "nothing more comes"
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        await command
    # Without this, the backoff of a flapping host would be up to 30 s each time.
    tunnel.retry_now()
    return port


async def _run_endless_command(tunnel: Tunnel) -> None:
    """A command that runs, or is about to run, when the connection is killed. If the command is killed first, the host
    still reports its end, but no exit status."""
    with contextlib.suppress(ExecError, TunnelDown):
        result = await tunnel.exec(["sleep", "600"], timeout_s=600.0)
        assert result.exit_status is None, result


async def _wait_settled(wanted: Snapshot | None) -> Snapshot:
    """The first snapshot that equals ``wanted``; for ``None``, the first that stays the same for a second. After
    ``SETTLE_S`` the last snapshot."""
    deadline = time.monotonic() + SETTLE_S
    last, since = _snapshot(), time.monotonic()
    while time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        now = _snapshot()
        if now.countable != last.countable:
            since = time.monotonic()
        last = now
        if last.countable == wanted.countable if wanted is not None else time.monotonic() - since > 1.0:
            break
    return last


def _snapshot() -> Snapshot:
    gc.collect()
    (zygote,) = process_resources.zygotes(os.getpid())
    return Snapshot(ProcessResources.of(os.getpid()), ProcessResources.of(zygote))


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
