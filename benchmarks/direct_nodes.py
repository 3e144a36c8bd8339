"""Measures a mesh of many real direct nodes: the longest stall of its event loop, and the CPU that it uses while idle.

::

    python benchmarks/direct_nodes.py [--nodes 3,100] [--seconds 20] [--runs 10] [--watch-s 15]

The nodes are stand-ins for Ollama on loopback, each on a port of its own, in one process; the mesh is a real `gpumesh
up -d` over them, with a runtime folder of its own. Since the servers run on this machine, each GPU probe looks for the
listening process and runs a (made-up) nvidia-smi: the most expensive case, which once blocked the loop for 2 s.

The stalls of the loop are the latencies of a `GET /healthz` every 20 ms over one keep-alive connection. On a busy
machine they include the time in which this program itself waits for a core. The goals: p99 below 50 ms with 100 nodes,
`status` within 1 s (300 ms with a few nodes), `status --watch` under 10 % of a core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from status_scale import GPUMESH, cpu_s, wall_ms, watch_cpu

from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama

POLL_S = 0.02
NVIDIA_SMI = """#!/bin/sh
case "$*" in
*query-gpu*) echo '0, GPU-00000000-0000-4000-8000-000000000000, 00000000:01:00.0, NVIDIA GeForce RTX 4090, 550.54.15, \
24564, 5632, 18932, 3, 1, 41, 62.5, 450.00, 210, 0, P8, Enabled, 0x1' ;;
esac
"""


async def stand_ins(count: int) -> None:
    """Runs the servers. Prints their ports, and ends when its standard input ends."""
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(SimOllama(profile.make_instant_host(f"n{number}")))
            for number in range(count)
        ]
        print(json.dumps([server.port for server in servers]), flush=True)
        await asyncio.to_thread(sys.stdin.read)


@asynccontextmanager
async def mesh(count: int, folder: Path) -> AsyncIterator[int]:
    """Runs a mesh over ``count`` servers, and yields the process id of its daemon."""
    servers = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--stand-ins", str(count), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert servers.stdin is not None
    assert servers.stdout is not None
    try:
        ports = json.loads(await servers.stdout.readline())
        nodes = [
            {"name": f"node-{number:03d}", "backend": {"url": f"http://127.0.0.1:{port}"}}
            for number, port in enumerate(ports)
        ]
        config = folder / f"mesh-{count}.yaml"
        config.write_text(json.dumps({"gateway": {"listen": "127.0.0.1:0"}, "nodes": nodes}))
        os.environ["GPUMESH_CONFIG"] = str(config)
        up = await asyncio.create_subprocess_exec(str(GPUMESH), "up", "-d", "--quiet", stdout=subprocess.DEVNULL)
        if await up.wait() != 0:
            raise RuntimeError(f"gpumesh up -d ended with {up.returncode}")
        try:
            yield await daemon_pid(folder)
        finally:
            down = await asyncio.create_subprocess_exec(str(GPUMESH), "down", "--quiet", stdout=subprocess.DEVNULL)
            await down.wait()
    finally:
        servers.stdin.close()
        await servers.wait()


async def daemon_pid(folder: Path) -> int:
    """The process id of the daemon that has our runtime folder in its environment."""
    variable = f"XDG_RUNTIME_DIR={folder}".encode()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            command = (process / "cmdline").read_bytes()
            if variable in (process / "environ").read_bytes().split(b"\0") and b"gpumesh.daemon" in command:
                return int(process.name)
        except OSError:
            continue
    raise RuntimeError("the mesh is not there")


async def gateway_url() -> str:
    """The gateway's URL. Raises RuntimeError unless all nodes are up."""
    process = await asyncio.create_subprocess_exec(str(GPUMESH), "status", "--json", stdout=subprocess.PIPE)
    out, _ = await process.communicate()
    status = json.loads(out)
    if status["totals"]["nodes_up"] != len(status["nodes"]):
        raise RuntimeError(f"{status['totals']['nodes_up']} of {len(status['nodes'])} nodes are up")
    return str(status["gateway"]["url"])


async def latencies_ms(base: str, seconds: float) -> list[float]:
    """The latencies of ``GET /healthz`` every 20 ms, each from the moment at which it should have been sent."""
    host, _, port = base.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    times_ms: list[float] = []
    due = time.perf_counter()
    try:
        while len(times_ms) * POLL_S < seconds:
            due += POLL_S
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r", 1)[0])
            await reader.readexactly(length)
            times_ms.append((time.perf_counter() - due) * 1000)
            due = max(due, time.perf_counter() - POLL_S)  # a stall counts once
    finally:
        writer.close()
    return times_ms


async def measure(count: int, seconds: float, runs: int, watch_s: float, folder: Path) -> dict[str, float | int]:
    async with mesh(count, folder) as pid:
        url = await gateway_url()
        await asyncio.sleep(5.0)  # until the probes that run only once have ended
        cpu_before_s, started_at = cpu_s(pid), time.monotonic()
        await asyncio.sleep(seconds)
        idle_share = (cpu_s(pid) - cpu_before_s) / (time.monotonic() - started_at)
        healthz_ms = sorted(await latencies_ms(url, seconds))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        status_ms = await wall_ms([str(GPUMESH), "status"], runs)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        status_cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        cpu_before_s, started_at = cpu_s(pid), time.monotonic()
        watch_share, _ = await watch_cpu(watch_s)
        watched_share = (cpu_s(pid) - cpu_before_s) / (time.monotonic() - started_at)
    return {
        "nodes": count,
        "healthz_p50_ms": round(statistics.median(healthz_ms), 2),
        "healthz_p99_ms": round(healthz_ms[int(len(healthz_ms) * 0.99)], 2),
        "healthz_max_ms": round(healthz_ms[-1], 1),
        "status_p50_ms": round(statistics.median(status_ms), 1),
        "status_max_ms": round(max(status_ms), 1),
        "status_cpu_ms": round(status_cpu_s * 1000 / (runs + 1), 1),
        "watch_core_pct": round(watch_share * 100, 2),
        "mesh_idle_core_pct": round(idle_share * 100, 2),
        "mesh_watched_core_pct": round(watched_share * 100, 2),
    }


async def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o700)
        smi = folder / "bin" / "nvidia-smi"
        smi.parent.mkdir()
        smi.write_text(NVIDIA_SMI)
        smi.chmod(0o755)
        path = f"{smi.parent}:{os.environ['PATH']}"
        os.environ.update({"HOME": name, "XDG_RUNTIME_DIR": name, "XDG_STATE_HOME": name, "PATH": path})
        for count in map(int, arguments.nodes.split(",")):
            figures = await measure(count, arguments.seconds, arguments.runs, arguments.watch_s, folder)
            print(json.dumps(figures), flush=True)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--nodes", default="3,100", help="numbers of nodes, with commas")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--watch-s", type=float, default=15.0)
    parser.add_argument("--stand-ins", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    given = parse_arguments()
    asyncio.run(stand_ins(given.stand_ins) if given.stand_ins else main(given))
