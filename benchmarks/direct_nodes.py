"""What a mesh of many real direct nodes costs: how long its event loop is ever held up, and what it uses while idle.

::

    python benchmarks/direct_nodes.py [--nodes 3,100] [--seconds 20] [--runs 10] [--watch-s 15]

The nodes are stand-ins for Ollama on loopback, each on a port of its own, in one process; the mesh is a real `gpumesh
up -d` over them, with a runtime folder of its own. Since the servers run on this machine, each GPU probe asks for the
listening process and runs a (made-up) nvidia-smi: the dearest case, which held the loop up for 2 s once.

The loop's stalls are what a 20 ms metronome of `GET /healthz` sees, over one kept connection; on a machine that has
other things to do they are also what the metronome itself waits for a core. To reach: p99 below 50 ms with 100 nodes,
`status` within 1 s (300 ms with a few), `status --watch` under 10 % of a core.
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

METRONOME_S = 0.02
SMI = """#!/bin/sh
case "$*" in
*query-gpu*) echo '0, GPU-00000000-0000-4000-8000-000000000000, 00000000:01:00.0, NVIDIA GeForce RTX 4090, 550.54.15, \
24564, 5632, 18932, 3, 1, 41, 62.5, 450.00, 210, 0, P8, Enabled, 0x1' ;;
esac
"""


async def stand_ins(count: int) -> None:
    """The servers' process: says their ports, and ends with its stdin."""
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(SimOllama(profile.make_instant_host(f"n{number}")))
            for number in range(count)
        ]
        print(json.dumps([server.port for server in servers]), flush=True)
        await asyncio.to_thread(sys.stdin.read)


@asynccontextmanager
async def mesh(count: int, folder: Path) -> AsyncIterator[int]:
    """A running mesh over ``count`` servers; its daemon's pid."""
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
    """The process that has our runtime folder in its environment and is not one of ours."""
    mark = f"XDG_RUNTIME_DIR={folder}".encode()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            words = (process / "cmdline").read_bytes()
            if mark in (process / "environ").read_bytes().split(b"\0") and b"gpumesh.daemon" in words:
                return int(process.name)
        except OSError:
            continue
    raise RuntimeError("the mesh is not there")


async def url() -> str:
    """The gateway's."""
    status = await asyncio.create_subprocess_exec(str(GPUMESH), "status", "--json", stdout=subprocess.PIPE)
    out, _ = await status.communicate()
    said = json.loads(out)
    if said["totals"]["nodes_up"] != len(said["nodes"]):
        raise RuntimeError(f"{said['totals']['nodes_up']} of {len(said['nodes'])} nodes are up")
    return str(said["gateway"]["url"])


async def latencies_ms(base: str, seconds: float) -> list[float]:
    """Of ``GET /healthz`` every 20 ms, from the moment at which each should have been asked."""
    host, _, port = base.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    took: list[float] = []
    due = time.perf_counter()
    try:
        while len(took) * METRONOME_S < seconds:
            due += METRONOME_S
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r", 1)[0])
            await reader.readexactly(length)
            took.append((time.perf_counter() - due) * 1000)
            due = max(due, time.perf_counter() - METRONOME_S)  # a stall counts once
    finally:
        writer.close()
    return took


async def measure(count: int, seconds: float, runs: int, watch_s: float, folder: Path) -> dict[str, float | int]:
    async with mesh(count, folder) as pid:
        base = await url()
        await asyncio.sleep(5.0)  # what is found out once is found out
        before, began = cpu_s(pid), time.monotonic()
        await asyncio.sleep(seconds)
        idle = (cpu_s(pid) - before) / (time.monotonic() - began)
        took = sorted(await latencies_ms(base, seconds))
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        table = await wall_ms([str(GPUMESH), "status"], runs)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        status_cpu_s = used.ru_utime + used.ru_stime - children.ru_utime - children.ru_stime
        before, began = cpu_s(pid), time.monotonic()
        watch, _rate = await watch_cpu(watch_s)
        watched = (cpu_s(pid) - before) / (time.monotonic() - began)
    return {
        "nodes": count,
        "healthz_p50_ms": round(statistics.median(took), 2),
        "healthz_p99_ms": round(took[int(len(took) * 0.99)], 2),
        "healthz_max_ms": round(took[-1], 1),
        "status_p50_ms": round(statistics.median(table), 1),
        "status_max_ms": round(max(table), 1),
        "status_cpu_ms": round(status_cpu_s * 1000 / (runs + 1), 1),
        "watch_core_pct": round(watch * 100, 2),
        "mesh_idle_core_pct": round(idle * 100, 2),
        "mesh_watched_core_pct": round(watched * 100, 2),
    }


async def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o700)
        smi = folder / "bin" / "nvidia-smi"
        smi.parent.mkdir()
        smi.write_text(SMI)
        smi.chmod(0o755)
        path = f"{smi.parent}:{os.environ['PATH']}"
        os.environ.update({"HOME": name, "XDG_RUNTIME_DIR": name, "XDG_STATE_HOME": name, "PATH": path})
        for count in map(int, arguments.nodes.split(",")):
            took = await measure(count, arguments.seconds, arguments.runs, arguments.watch_s, folder)
            print(json.dumps(took), flush=True)


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--nodes", default="3,100", help="numbers of nodes, with commas")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--watch-s", type=float, default=15.0)
    parser.add_argument("--stand-ins", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    given = parsed()
    asyncio.run(stand_ins(given.stand_ins) if given.stand_ins else main(given))
