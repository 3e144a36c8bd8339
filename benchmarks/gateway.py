"""Compares the gateway to nginx, haproxy and LiteLLM, on the same stand-in, in one run (DESIGN section 11).

    python benchmarks/gateway.py [--rounds N] [--litellm PROGRAM] [--only NAME …] [--json] [--check]

Each route is measured in turn, round after round, so that other load of the machine affects all routes alike. The
figures are medians over the rounds. nginx, haproxy, ssh and sshd are used if they are installed, LiteLLM if its program
is named (`pip install 'litellm[proxy]'` in an environment of its own). nginx has one worker, as the gateway has one
process.

- added: sequential p50 over keep-alive, less the direct p50, in ms
- req/s: at 32 in flight
- token delay: p99 in ms at 32 streams of 100 tokens/s, from the stand-in's write to the client's read
- through ssh: the same figures over a real sshd, the gateway's own tunnel against nginx behind a stock ``ssh -N -L``.
  There the stand-in writes an answer's head and body 100 us apart, as servers do. Otherwise sshd would often read them
  as one piece, and Nagle's algorithm would have nothing to hold back
- many: 256 streams over two nodes with tunnels
- memory: the gateway's memory for each of 1,000 streams that are open and idle
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from tunnel_routes import child_server, stock_ssh

from tests.tunnels.sshd import Sshd

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
MODEL = "bench:1b"

NGINX = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.err;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
  fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
  keepalive_requests 1000000;
  upstream backend {{ server 127.0.0.1:{target}; keepalive 512; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection "";
                  proxy_buffering off; }}
  }}
}}
"""
HAPROXY = """
global
  maxconn 4096
  nbthread 1
defaults
  mode http
  option http-no-delay
  option http-keep-alive
  http-reuse always
  timeout connect 5s
  timeout client 600s
  timeout server 600s
listen proxy
  bind 127.0.0.1:{port}
  server backend 127.0.0.1:{target}
"""
LITELLM = """
model_list:
  - model_name: "bench:1b"
    litellm_params: {{model: "ollama_chat/bench:1b", api_base: "http://127.0.0.1:{target}"}}
litellm_settings: {{telemetry: false}}
general_settings: {{dangerously_permit_weak_or_unset_master_key: true}}
"""


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def program(*argv: str, port: int, folder: Path, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs a server, from the time at which it listens on ``port``. At the end its whole process group is ended."""
    with (folder / f"{Path(argv[0]).name}.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    try:
        async with asyncio.timeout(90):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                if process.returncode is not None:
                    raise SystemExit(f"{argv[0]} ended: {Path(log.name).read_text()[-2000:]}")
                await asyncio.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


@contextlib.asynccontextmanager
async def gpumesh(
    nodes: Sequence[dict[str, Any]], folder: Path, name: str, *, checkout: Path = ROOT
) -> AsyncIterator[tuple[int, int]]:
    """Runs `gpumesh up` in a process of its own, with the code in ``checkout``. Yields its port and process id when all
    nodes are up."""
    port = free_port()
    file = folder / f"{name}.yaml"
    runtime = folder / f"{name}-run"
    runtime.mkdir(mode=0o700)
    gateway = {"listen": f"127.0.0.1:{port}"}
    file.write_text(json.dumps({"version": 1, "name": name, "gateway": gateway, "nodes": list(nodes)}))
    argv = (sys.executable, "-P", "-m", "gpumesh", "--config", str(file), "--quiet", "up")
    # The state folder, too: what an earlier run has learned would change the figures of this one.
    environment = {"XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(runtime), "PYTHONPATH": str(checkout)}
    async with program(*argv, port=port, folder=folder, **environment) as process:
        async with asyncio.timeout(30):
            while True:  # the gateway listens before its nodes are up
                status = await _get(port, "/mesh/status")
                if all(node["backend"]["state"] == "up" for node in status["nodes"]):
                    break
                await asyncio.sleep(0.1)
        yield port, process.pid


async def _get(port: int, path: str) -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
    finally:
        writer.close()
    return json.loads(answer.partition(b"\r\n\r\n")[2])


async def client(kind: str, port: int, *arguments: str) -> dict[str, float]:
    """The figures of `lean_client.py`, run in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(HERE / "lean_client.py"),
        kind,
        f"http://127.0.0.1:{port}",
        *arguments,
        stdout=subprocess.PIPE,
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise SystemExit(f"the client failed on port {port}")
    figures: dict[str, float] = json.loads(out)
    return figures


def stand_in(*arguments: str) -> contextlib.AbstractAsyncContextManager[int]:
    return child_server(sys.executable, str(HERE / "fast_ollama.py"), *arguments)


def direct_node(name: str, port: int, parallel: int = 1024) -> dict[str, Any]:
    return {"name": name, "backend": {"url": f"http://127.0.0.1:{port}", "max_parallel": parallel}}


def ssh_node(name: str, sshd: Sshd, port: int) -> dict[str, Any]:
    spec = sshd.spec()
    ssh = {"host": spec.host, "port": spec.port, "user": spec.user, "agent": False}
    ssh |= {"identity_file": str(sshd.identity), "known_hosts": str(sshd.known_hosts)}
    return {"name": name, "ssh": ssh, "backend": {"port": port, "max_parallel": 1024}}


async def routes(stack: contextlib.AsyncExitStack, target: int, folder: Path, litellm: str | None) -> dict[str, int]:
    """Starts every proxy that is installed, in front of one stand-in. Returns the port of each by name."""
    ports = {"direct": target}
    ports["gpumesh"], _ = await stack.enter_async_context(gpumesh([direct_node("one", target)], folder, "alone"))
    for name, text, flags in (("nginx", NGINX, ("-c",)), ("haproxy", HAPROXY, ("-db", "-f"))):
        path = shutil.which(name, path=PATH)
        if path is None:
            print(f"{name} is not installed: left out", file=sys.stderr)
            continue
        port = free_port()
        file = folder / f"{name}.conf"
        file.write_text(text.format(port=port, target=target, folder=folder))
        await stack.enter_async_context(program(path, *flags, str(file), port=port, folder=folder))
        ports[name] = port
    if litellm is not None:
        port = free_port()
        file = folder / "litellm.yaml"
        file.write_text(LITELLM.format(target=target))
        argv = (litellm, "--config", str(file), "--host", "127.0.0.1", "--port", str(port))
        # Without this variable LiteLLM downloads a list of prices.
        await stack.enter_async_context(
            program(*argv, port=port, folder=folder, LITELLM_LOCAL_MODEL_COST_MAP="True", NO_PROXY="127.0.0.1")
        )
        ports["litellm"] = port
    return ports


async def run_rounds(ports: dict[str, int], count: int, wanted: Callable[[str], bool]) -> dict[str, dict[str, float]]:
    """The median figures of each route. ``wanted``: whether a measurement (``added``, ``throughput``, ``streams``) is
    to be made."""
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in ports}
    errors = dict.fromkeys(ports, 0.0)
    for _ in range(count):
        for name, port in ports.items():
            path = ("--path", "/v1/chat/completions") if name == "litellm" else ()
            is_slow = name == "litellm"
            if wanted("added"):
                got = await client("sequential", port, "-n", "100" if is_slow else "500", *path)
                samples[name].setdefault("p50_ms", []).append(got["p50_ms"])
                errors[name] += got["errors"]
            if wanted("throughput"):
                got = await client("throughput", port, "-n", "32", "--seconds", "2", *path)
                samples[name].setdefault("requests_per_s", []).append(got["requests_per_s"])
                errors[name] += got["errors"]
            if wanted("streams") and not is_slow:
                got = await client("streams", port, "-n", "32", "--tokens", "100", "--spread", "0.1")
                samples[name].setdefault("token_delay_p99_ms", []).append(got["delay_p99_ms"])
                errors[name] += got["errors"]
    return {
        name: {**{key: statistics.median(values) for key, values in figures.items()}, "errors": errors[name]}
        for name, figures in samples.items()
    }


def rss_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


async def memory(folder: Path, streams: int = 1000) -> dict[str, float]:
    """The gateway's memory (KB) for each stream that is open and idle."""
    async with stand_in() as target, gpumesh([direct_node("one", target, 4096)], folder, "memory") as (port, pid):
        await client("streams", port, "-n", "64", "--tokens", "10")
        before = rss_kb(pid)
        body = json.dumps({"model": MODEL, "messages": [], "options": {"num_predict": 2, "rate": 0.02}}).encode()
        request = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        writers = []
        for start in range(0, streams, 100):
            connections = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(100)))
            for _, writer in connections:
                writer.write(request)
                writers.append(writer)
            while (await _get(port, "/mesh/status"))["gateway"]["in_flight"] < min(start + 100, streams):
                await asyncio.sleep(0.05)
        after = rss_kb(pid)
        for writer in writers:
            writer.close()
    return {"streams": streams, "kb_per_stream": (after - before) / streams}


async def through_ssh(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Compares the gateway and its own tunnel to nginx and a stock ssh, over one sshd."""
    nginx = shutil.which("nginx", path=PATH)
    async with contextlib.AsyncExitStack() as stack:
        sshd = await stack.enter_async_context(Sshd(folder / "sshd", {"LogLevel": "ERROR"}))
        target = await stack.enter_async_context(stand_in("--apart", "100"))
        ports = {"direct": target}
        nodes = [ssh_node("one", sshd, target)]
        ports["gpumesh + tunnel"], _ = await stack.enter_async_context(gpumesh(nodes, folder, "tunnel"))
        if nginx is not None:
            port = free_port()
            file = folder / "nginx-ssh.conf"
            tunnel_port = await stack.enter_async_context(stock_ssh(sshd, target))
            file.write_text(NGINX.format(port=port, target=tunnel_port, folder=folder))
            await stack.enter_async_context(program(nginx, "-c", str(file), port=port, folder=folder))
            ports["nginx + ssh -N -L"] = port
        return await run_rounds(ports, count, lambda what: what in ("added", "streams"))


async def many(folder: Path) -> dict[str, dict[str, float]]:
    """Compares 256 streams over two nodes, each behind its tunnel, to 256 streams directly to one server."""
    async with contextlib.AsyncExitStack() as stack:
        nodes, targets = [], []
        for name in ("one", "two"):
            sshd = await stack.enter_async_context(Sshd(folder / f"sshd-{name}", {"LogLevel": "ERROR"}))
            targets.append(await stack.enter_async_context(stand_in()))
            nodes.append(ssh_node(name, sshd, targets[-1]))
        port, _ = await stack.enter_async_context(gpumesh(nodes, folder, "many"))
        arguments = ("-n", "256", "--tokens", "200", "--spread", "0.5")
        direct = await client("streams", targets[0], *arguments)
        through = await client("streams", port, *arguments)
    return {"direct": direct, "gpumesh": {**through, "times_direct": through["finished_s"] / direct["finished_s"]}}


def verdicts(figures: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """The goals of DESIGN section 11, each as (description, figure, bound, whether the figure is within the bound)."""
    rows: list[tuple[str, float, float, bool]] = []

    def at_most(what: str, value: float, bound: float) -> None:
        rows.append((what, value, bound, value <= bound))

    def at_least(what: str, value: float, bound: float) -> None:
        rows.append((what, value, bound, value >= bound))

    proxies = figures.get("proxies", {})
    ours = proxies.get("gpumesh", {})
    if "p50_ms" in ours:
        at_most("gateway alone: added ms, p50", ours["p50_ms"] - proxies["direct"]["p50_ms"], 0.4)
    for peer, share in (("nginx", 0.75), ("litellm", 35.0)):
        if "requests_per_s" in ours and peer in proxies:
            ratio = ours["requests_per_s"] / proxies[peer]["requests_per_s"]
            at_least(f"requests/s at 32 in flight, times {peer}", ratio, share)
    if "token_delay_p99_ms" in ours:
        at_most("token delay p99 ms, 32 streams, no tunnel", ours["token_delay_p99_ms"], 5.0)
    ssh = figures.get("ssh", {})
    if ssh:
        tunnel = ssh["gpumesh + tunnel"]
        added = tunnel["p50_ms"] - ssh["direct"]["p50_ms"]
        at_most("gateway + tunnel: added ms, p50", added, 1.0)
        at_most("token delay p99 ms, 32 streams, tunnel", tunnel["token_delay_p99_ms"], 5.0)
        if "nginx + ssh -N -L" in ssh:
            stock = ssh["nginx + ssh -N -L"]["p50_ms"] - ssh["direct"]["p50_ms"]
            at_least("times less than nginx + ssh -N -L adds", stock / added, 40.0)
    if "many" in figures:
        at_most("256 streams over two nodes, times direct", figures["many"]["gpumesh"]["times_direct"], 1.1)
        at_most("256 streams over two nodes, errors", figures["many"]["gpumesh"]["errors"], 0)
    if "memory" in figures:
        at_most("KB for each of 1,000 idle streams", figures["memory"]["kb_per_stream"], 40.0)
    return rows


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    def wanted(what: str) -> bool:
        return not given.only or what in given.only

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gpumesh-bench-") as name:
        folder = Path(name)
        if wanted("added") or wanted("throughput") or wanted("streams"):
            async with stand_in() as target, contextlib.AsyncExitStack() as stack:
                ports = await routes(stack, target, folder, given.litellm)
                figures["proxies"] = await run_rounds(ports, given.rounds, wanted)
        if wanted("ssh"):
            figures["ssh"] = await through_ssh(folder, given.rounds)
        if wanted("many"):
            figures["many"] = await many(folder)
        if wanted("memory"):
            figures["memory"] = await memory(folder)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--litellm", metavar="PROGRAM")
    parser.add_argument("--only", nargs="+", choices=["added", "throughput", "streams", "ssh", "many", "memory"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bound is missed")
    given = parser.parse_args()
    figures = asyncio.run(measure(given))
    verdict_rows = verdicts(figures)
    if given.json:
        rows = [
            {"what": what, "figure": value, "bound": bound, "kept": within_bound}
            for what, value, bound, within_bound in verdict_rows
        ]
        print(json.dumps({"figures": figures, "verdicts": rows}, indent=2))
    else:
        for group in ("proxies", "ssh"):
            if group in figures:
                print(f"{group:<20}{'p50 ms':>9}{'req/s':>9}{'p99 token ms':>14}{'errors':>8}")
                for name, row in figures[group].items():
                    cells = [row.get(key, float("nan")) for key in ("p50_ms", "requests_per_s", "token_delay_p99_ms")]
                    print(f"{name:<20}{cells[0]:>9.3f}{cells[1]:>9.0f}{cells[2]:>14.2f}{row['errors']:>8.0f}")
        for what, value, bound, within_bound in verdict_rows:
            print(f"{'ok  ' if within_bound else 'MISS'} {what}: {value:.2f} (to reach: {bound:g})")
    return 1 if given.check and not all(within_bound for *_, within_bound in verdict_rows) else 0


if __name__ == "__main__":
    sys.exit(main())
