"""Measures the time of `gpumesh status` on a running mesh and the cost of `gpumesh status --watch`, by number of nodes.

::

    python benchmarks/status_scale.py [--nodes 1,100] [--runs 15] [--watch-s 20]

The mesh behind the socket is made up: its nodes and their GPUs change as probes would change them (each node every two
seconds). So only the command is measured, not the mesh; direct_nodes.py measures both, over real nodes. The commands
are real processes. `--watch` draws on a pseudo-terminal of 200 x 50, which this program reads. The goals: `status`
within 300 ms, with 100 nodes within 1 s (DESIGN section 11); `--watch` of 100 nodes under 10 % of one core (issue 6).
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import pty
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

from gpumesh.config.comparison import ConfigSnapshot
from gpumesh.config.live_changes import ReloadReport
from gpumesh.daemon import paths as mesh_paths
from gpumesh.daemon.control_socket.server import ControlServer
from gpumesh.daemon.mesh_lock import MeshLock
from gpumesh.daemon.sessions.session import PromptAnswer, PromptRequest
from gpumesh.mesh.change_notifier import ChangeNotifier
from gpumesh.mesh.history import History, Recorder
from gpumesh.mesh.outages.outage import Outage
from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import PoolPlan, PoolState
from gpumesh.state import (
    BackendPhase,
    BackendState,
    GatewayPhase,
    GatewayState,
    GpuState,
    Health,
    HostState,
    LoadedModel,
    LoadState,
    MeshState,
    ModelInfo,
    NodeState,
    ProcessState,
    TunnelPhase,
    TunnelState,
    compute_totals,
)
from gpumesh.tunnels.base import ExecChunk

GPUMESH = Path(sys.executable).with_name("gpumesh")
MODELS = tuple(
    ModelInfo(f"model-{number}:7b", f"{number:064d}", 4466, None, "7.6B", "Q4_K_M", "qwen2") for number in range(6)
)
PROBE_EVERY_S = 2.0


def make_node(number: int, random: Random) -> NodeState:
    """A node with one or two busy GPUs, as a probe would find it."""
    at = datetime.now(UTC)
    gpus = tuple(
        GpuState(
            index=index,
            uuid=f"GPU-{number:08d}-{index:04d}-4000-8000-000000000000",
            name="NVIDIA GeForce RTX 4090",
            memory_total_mib=24564,
            memory_used_mib=random.randrange(24000),
            memory_free_mib=random.randrange(24000),
            utilization_pct=random.randrange(101),
            temperature_c=random.randrange(30, 85),
            power_w=random.uniform(17, 450),
            power_limit_w=450.0,
            processes=(ProcessState(4000 + index, "/usr/local/bin/ollama runner", 5280),),
        )
        for index in range(1 + number % 2)
    )
    return NodeState(
        name=f"node-{number:03d}",
        health=Health.HEALTHY,
        reason=None,
        tunnel=TunnelState(
            "sshtunnel", TunnelPhase.UP, since=at, rtt_ms=random.uniform(0.5, 90), local_port=40000 + number
        ),
        host=HostState(f"host-{number}", "550.54.15"),
        gpus=gpus,
        backend=BackendState(
            "ollama",
            BackendPhase.UP,
            url=f"http://127.0.0.1:{40000 + number}",
            version="0.12.6",
            models=tuple(model.name for model in MODELS),
            loaded=(LoadedModel("model-1:7b", 5280, 5280, at + timedelta(minutes=4), 8192),),
            latency_ms=random.uniform(1, 90),
            tokens_per_s=random.uniform(0, 120),
            catalog=MODELS,
        ),
        load=LoadState(in_flight=random.randrange(2), limit=1, served=random.randrange(1000)),
    )


class SimulatedSession:
    """A ``Session`` whose nodes change as if they were probed, one after the other."""

    def __init__(self, count: int) -> None:
        self._random = Random(count)
        self._nodes = [make_node(number, self._random) for number in range(count)]
        self._changes = ChangeNotifier()
        self._recorder = Recorder()

    async def change_nodes(self) -> None:
        recorded_at = 0.0
        while True:
            for number in range(len(self._nodes)):
                self._nodes[number] = make_node(number, self._random)
                self._changes.notify()
                await asyncio.sleep(PROBE_EVERY_S / len(self._nodes))
                if time.monotonic() - recorded_at > PROBE_EVERY_S:
                    recorded_at = time.monotonic()
                    self._recorder.add(await self.status())

    async def status(self) -> MeshState:
        nodes = tuple(self._nodes)
        gateway = GatewayState("http://127.0.0.1:11430", GatewayPhase.SERVING, in_flight=3)
        return MeshState("made-up", datetime.now(UTC), gateway, compute_totals(nodes), nodes)

    async def wait_first_report(self, timeout_s: float) -> MeshState:
        del timeout_s
        return await self.status()

    async def watch(self, interval_s: float) -> AsyncGenerator[MeshState]:
        async for _ in self._changes.watch():
            yield await self.status()
            await asyncio.sleep(interval_s)

    async def configuration(self) -> ConfigSnapshot | None:
        return None

    async def reload(self) -> ReloadReport:
        return ReloadReport()

    async def history(self) -> History:
        return self._recorder.history()

    def chat(self, ask: PromptRequest) -> AbstractAsyncContextManager[PromptAnswer]:
        raise NotImplementedError

    async def exec(self, node: str, argv: Sequence[str]) -> AsyncGenerator[ExecChunk]:
        del node, argv
        return
        yield

    async def drain(self, node: str) -> None:
        index = int(node.rpartition("-")[2])
        self._nodes[index] = replace(self._nodes[index], health=Health.DRAINING)

    async def resume(self, node: str) -> None:
        del node

    def hold(self, node: str, outage: Outage) -> AbstractAsyncContextManager[None]:
        raise NotImplementedError

    async def reconnect(self, node: str) -> None:
        del node

    async def plan_pool(self, spec: PoolSpec) -> PoolPlan:
        raise NotImplementedError

    async def start_pool(self, name: str) -> AsyncGenerator[PoolState]:
        del name
        return
        yield

    async def stop_pool(self, name: str) -> None:
        del name

    async def pools(self) -> tuple[PoolState, ...]:
        return ()


async def wall_ms(command: Sequence[str], runs: int) -> list[float]:
    """The wall time of each run, without the first, which reads the disk."""
    times_ms = []
    for _ in range(runs + 1):
        started_at = time.perf_counter()
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
        if await process.wait() != 0:
            raise RuntimeError(f"{command} ended with {process.returncode}")
        times_ms.append((time.perf_counter() - started_at) * 1000)
    return times_ms[1:]


async def watch_cpu(seconds: float) -> tuple[float, int]:
    """The share of one core that `status --watch` uses once it is drawn, and the bytes/s that it writes."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    process = await asyncio.create_subprocess_exec(
        str(GPUMESH), "status", "-w", stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    )
    os.close(terminal)
    written = 0

    def read() -> None:
        nonlocal written
        try:
            written += len(os.read(controller, 65536))
        except OSError:  # EIO: the command has ended
            asyncio.get_running_loop().remove_reader(controller)

    asyncio.get_running_loop().add_reader(controller, read)
    try:
        await asyncio.sleep(3.0)  # until it has started
        cpu_before_s, written_before = cpu_s(process.pid), written
        await asyncio.sleep(seconds)
        return (cpu_s(process.pid) - cpu_before_s) / seconds, int((written - written_before) / seconds)
    finally:
        process.send_signal(signal.SIGINT)
        await process.wait()
        asyncio.get_running_loop().remove_reader(controller)
        os.close(controller)


def cpu_s(pid: int) -> float:
    """The CPU seconds that a process has used (utime and stime of proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(count: int, runs: int, watch_s: float, folder: Path) -> dict[str, float | int]:
    config = folder / f"mesh-{count}.yaml"
    config.write_text(json.dumps({"nodes": [{"name": "a", "backend": {"url": "http://127.0.0.1:1"}}]}))
    os.environ["GPUMESH_CONFIG"] = str(config)
    paths = mesh_paths.for_config(config)
    lock = MeshLock.acquire(paths)
    session = SimulatedSession(count)
    changes = asyncio.create_task(session.change_nodes())
    try:
        async with ControlServer(session, paths.socket, on_stop=lambda _: None):
            table_ms = await wall_ms([str(GPUMESH), "status"], runs)
            json_ms = await wall_ms([str(GPUMESH), "status", "--json"], runs)
            cpu_share, bytes_per_s = await watch_cpu(watch_s)
    finally:
        changes.cancel()
        paths.remove_files()
        lock.release()
    return {
        "nodes": count,
        "status_p50_ms": round(statistics.median(table_ms), 1),
        "status_max_ms": round(max(table_ms), 1),
        "status_json_p50_ms": round(statistics.median(json_ms), 1),
        "watch_core_pct": round(cpu_share * 100, 2),
        "watch_bytes_per_s": bytes_per_s,
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--nodes", default="1,100", help="numbers of nodes, with commas")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--watch-s", type=float, default=20.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as name:
        folder = Path(name)
        os.environ.update({"HOME": name, "XDG_RUNTIME_DIR": name, "XDG_STATE_HOME": name})
        folder.chmod(0o700)
        python = await wall_ms([sys.executable, "-c", "pass"], arguments.runs)
        print(json.dumps({"python_p50_ms": round(statistics.median(python), 1)}))
        for count in map(int, arguments.nodes.split(",")):
            print(json.dumps(await measure(count, arguments.runs, arguments.watch_s, folder)), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
