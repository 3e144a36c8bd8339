"""One supervised tunnel whose connection is killed again and again while it is being used, and what its mesh's process
and the zygote have before and after. test_chaos_cycles.py asks for a few cycles, benchmarks/cycles.py for hundreds."""

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
from tests.real import belongings
from tests.real.belongings import ProcessResources
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import Sshd, serving

CONNECTIONS = 4  # through the tunnel, at the moment of each kill
SETTLE_S = 5.0


@dataclass(frozen=True)
class Snapshot:
    """Of the mesh's process and of the zygote that forks its tunnels' processes."""

    mesh: ProcessResources
    zygote: ProcessResources

    @property
    def countable(self) -> tuple[int, ...]:
        return (*self.mesh.countable, *self.zygote.countable)


@dataclass(frozen=True)
class CycleReport:
    """``before`` is after the warm-up. ``ports``: the local ports that the tunnel had; ``leftover_files``: files in the
    runtime folder when all was over."""

    transport: str
    count: int
    seconds: float
    before: Snapshot
    after: Snapshot
    ports: frozenset[int]
    reconnects: int
    leftover_files: tuple[str, ...]


async def churn(
    folder: Path, runtime: Path, transport: TransportKind, *, cycles: int, warm_up: int, progress: Callable[[int], None]
) -> CycleReport:
    """``runtime``: what XDG_RUNTIME_DIR is. Raises AssertionError when a cycle does not do what it should."""
    async with Sshd(folder / "sshd", {"LogLevel": "ERROR"}) as sshd, serving(_echo) as target, WorkerPool() as workers:
        spec = NodeSpec(
            "churned", BackendSpec(targets=(Target("127.0.0.1", target),)), ssh=sshd.spec(transport=transport)
        )
        async with run_tunnel(open_tunnel(spec, workers=workers, on_change=lambda _: None)) as tunnel:
            for _ in range(warm_up):
                await _cycle(tunnel, sshd)
                gc.collect()
            await tunnel.wait_up()
            before = await _settled(None)
            reconnects = tunnel.state.reconnects
            ports = set()
            began = time.monotonic()
            for number in range(cycles):
                ports.add(await _cycle(tunnel, sshd))
                # Else what is measured is how much garbage piles up until Python looks for it: up to 1 MiB.
                gc.collect()
                progress(number + 1)
            seconds = time.monotonic() - began
            await tunnel.wait_up()
            after = await _settled(before)
            reconnects = tunnel.state.reconnects - reconnects
    left = tuple(str(path.relative_to(runtime)) for path in runtime.rglob("*") if not path.is_dir())
    return CycleReport(transport.value, cycles, seconds, before, after, frozenset(ports), reconnects, left)


async def _cycle(tunnel: Tunnel, sshd: Sshd) -> int:
    """Used, killed, noticed, told to come back; the local port."""
    await tunnel.wait_up()
    port = tunnel.state.local_port
    assert port is not None
    streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)]
    for number, (reader, writer) in enumerate(streams):
        writer.write(b"%d" % number)
        async with asyncio.timeout(SETTLE_S):
            assert await reader.readexactly(1) == b"%d" % number
    command = asyncio.create_task(_endless(tunnel))
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
    # A host that flaps like this is backed off from, up to 30 s each time; a person who says "now" is obeyed.
    tunnel.retry_now()
    return port


async def _endless(tunnel: Tunnel) -> None:
    """A command that is under way, or about to be, when the connection goes. It is killed as well, and may be the
    first: then the host still tells that it ended, but not how."""
    with contextlib.suppress(ExecError, TunnelDown):
        result = await tunnel.exec(["sleep", "600"], timeout_s=600.0)
        assert result.exit_status is None, result


async def _settled(wanted: Snapshot | None) -> Snapshot:
    """What there is once it is as ``wanted``, or, for ``None``, has been the same for a second. After ``SETTLE_S``
    what there is then."""
    ends = time.monotonic() + SETTLE_S
    last, since = _snapshot(), time.monotonic()
    while time.monotonic() < ends:
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
    (zygote,) = belongings.zygotes(os.getpid())
    return Snapshot(ProcessResources.of(os.getpid()), ProcessResources.of(zygote))


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
