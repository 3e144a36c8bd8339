"""Measures for how long a large body stops the gateway's event loop: all other clients wait for so long.

    chrt -f 20 taskset -c 1 python benchmarks/loop_stalls.py [--mib 100] [--messages 500000] [--only TEXT] [--stacks]

A task of the gateway's own loop wakes each 5 ms. The figures are of the longest time between two wakes: the CPU time of
the loop's thread in it, which other programs do not lengthen, and the wall time. The client and the servers are
processes of their own. ``--stacks`` prints where the loop was at the longest stall of each case.

Cases: each route that takes a large body, with

- a text: one long string; an image: the same as base64; many: N messages of one letter (or texts, or numbers)
- plain: the body goes to a node; model last: the name of the model is the last member, and the server knows the model
  by another name; cut: the first node resets the connection after the third token; failover: before the first
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvloop

from gpumesh.daemon.process.garbage_collector import tune_garbage_collector
from gpumesh.gateway.app import Gateway
from gpumesh.mesh.mesh import Mesh
from gpumesh.topology import BackendKind, BackendSpec, GatewaySpec, ModelSpec, NodeSpec, Target, Topology

MODEL, OTHER_NAME = "bench:1b", "served:1b"
TICK_S = 0.005
STALL_S = 0.02  # the watcher looks at the stack after so long
TOKENS = 6
CUT_AFTER = 3


# -- bodies -----------------------------------------------------------------------------------------------------------


def member(path: str, kind: str, size: int, count: int) -> bytes:
    """The member that makes the body of this route large."""
    match kind:
        case "text":
            text = b"Why is the sky blue? " * (size // 21)
        case "image":
            text = base64.b64encode(os.urandom(3 << 20)) * (size // (4 << 20))
        case _:
            text = b""
    message = b'{"role":"user","content":"a"}'
    many = kind == "many"
    match path.rpartition("/")[2]:
        case "generate" if kind == "image":
            return b'"prompt":"?","images":["' + text + b'"]'
        case "generate" if many:
            return b'"prompt":"?","context":[' + b",".join([b"123"] * count) + b"]"
        case "generate" | "completions" if not path.endswith("chat/completions"):
            return b'"prompt":' + (b"[" + b",".join([b'"a"'] * count) + b"]" if many else b'"' + text + b'"')
        case "embed" | "embeddings" | "responses":
            entry = message if path.endswith("responses") else b'"a"'
            return b'"input":' + (b"[" + b",".join([entry] * count) + b"]" if many else b'"' + text + b'"')
        case "rerank":
            entries = b",".join([b'"a"'] * count) if many else b'"' + text + b'"'
            return b'"query":"?","documents":[' + entries + b"]"
        case "show" | "pull" | "create" | "copy" | "delete":
            return b'"system":' + (b"[" + b",".join([b'"a"'] * count) + b"]" if many else b'"' + text + b'"')
    if many:
        return b'"messages":[' + b",".join([message] * count) + b"]"
    if kind == "image" and path.startswith("/api/"):
        return b'"messages":[{"role":"user","content":"?","images":["' + text + b'"]}]'
    if kind == "image":
        part = b'{"type":"image_url","image_url":{"url":"data:image/png;base64,' + text + b'"}}'
        return b'"messages":[{"role":"user","content":[' + part + b"]}]"
    return b'"messages":[{"role":"user","content":"' + text + b'"}]'


def body(path: str, kind: str, size: int, count: int, *, model_last: bool) -> bytes:
    large = member(path, kind, size, count)
    name = f'"model":"{MODEL}"'.encode()
    stream = b'"stream":true'
    order = (large, stream, name) if model_last else (name, stream, large)
    return b"{" + b",".join(order) + b"}"


def form(size: int) -> bytes:
    """A recording, with the model after it."""
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    return (
        head
        + os.urandom(size)
        + b'\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nbench:1b\r\n--b--\r\n'
    )


# -- the servers ------------------------------------------------------------------------------------------------------


def frame(path: str, index: int) -> bytes:
    """A token, or the end, of a stream of this route."""
    last = index == TOKENS
    if path.startswith("/api/"):
        text = {"content": "" if last else f" w{index}"}
        part = {"message": {"role": "assistant", **text}} if path == "/api/chat" else {"response": text["content"]}
        return json.dumps({"model": MODEL, **part, "done": last}).encode() + b"\n"
    if path == "/v1/messages":
        document = {"type": "message_stop"} if last else {"type": "content_block_delta", "delta": {"text": "w"}}
        return b"data: " + json.dumps(document).encode() + b"\n\n"
    if path == "/v1/responses":
        document = {"type": "response.completed" if last else "response.output_text.delta", "delta": "w"}
        return b"data: " + json.dumps(document).encode() + b"\n\n"
    choice = {"index": 0, "finish_reason": "stop" if last else None}
    part = {"text": f" w{index}"} if path == "/v1/completions" else {"delta": {} if last else {"content": f" w{index}"}}
    done = b"data: [DONE]\n\n" if last else b""
    return b"data: " + json.dumps({"id": "1", "choices": [choice | part]}).encode() + b"\n\n" + done


async def run_server(fails: str) -> None:
    """An Ollama. ``fails``: "never", "cut" or "failover": this one breaks off, if the query of the path says so."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, target, _ = head.split(b" ", 2)
                path, _, query = target.decode().partition("?")
                lines = head.lower().split(b"\r\n")
                missing = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
                start = b""
                while missing:
                    data = await reader.read(min(missing, 1 << 20))
                    if not data:
                        return
                    start = start or data
                    missing -= len(data)
                if method == b"GET":
                    names = [
                        {"name": name, "model": name} for name in ((OTHER_NAME,) if "alias" in ALIAS else (MODEL,))
                    ]
                    reply = {"/api/version": {"version": "0.12.6"}, "/api/ps": {"models": []}}.get(
                        path, {"models": names}
                    )
                    await send(writer, json.dumps(reply).encode())
                elif query == fails == "failover":
                    writer.transport.abort()
                elif b"_debug_render_only" in start:
                    await send(writer, b'{"_debug_info":{"rendered_template":"no"}}')
                elif path in STREAM_ROUTES:
                    kind = b"application/x-ndjson" if path.startswith("/api/") else b"text/event-stream"
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % kind)
                    for index in range(TOKENS + 1):
                        if query == fails == "cut" and index == CUT_AFTER:
                            await asyncio.sleep(0.1)
                            writer.transport.abort()
                            return
                        data = frame(path, index)
                        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
                        await asyncio.sleep(0.01)
                    writer.write(b"0\r\n\r\n")
                else:
                    await send(writer, b'{"ok":true}')
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


ALIAS: set[str] = set()
STREAM_ROUTES = (
    "/api/chat",
    "/api/generate",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)


async def send(writer: asyncio.StreamWriter, reply: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(reply)
    writer.write(head + reply)
    await writer.drain()


async def run_client(port: int, target: str, file: Path, content_type: str) -> None:
    """Sends the file, and prints the status and the end of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    size = file.stat().st_size
    head = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\nContent-Length: {size}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n")
    with file.open("rb") as source:
        while data := source.read(1 << 20):
            writer.write(data)
            await writer.drain()
    answer = await reader.read()
    print(json.dumps([answer[9:12].decode(), answer[-300:].decode("utf-8", "replace")]))


# -- the measurement --------------------------------------------------------------------------------------------------


@dataclass
class Stall:
    cpu_s: float = 0.0
    wall_s: float = 0.0
    stack: str = ""


class Watcher:
    """Measures the longest stall of the running loop."""

    def __init__(self) -> None:
        self.longest = Stall()
        self.woke_at = time.monotonic()
        self._thread_id = threading.get_ident()
        self._stacks: list[tuple[float, str]] = []

    async def tick(self) -> None:
        while True:
            cpu, wall = time.thread_time(), time.monotonic()
            self.woke_at = wall
            self._stacks.clear()
            await asyncio.sleep(TICK_S)
            used = time.thread_time() - cpu
            if used > self.longest.cpu_s:
                stack = self._stacks[-1][1] if self._stacks else ""
                self.longest = Stall(used, time.monotonic() - wall, stack)

    def watch_stacks(self) -> None:
        while True:
            time.sleep(0.01)
            if time.monotonic() - self.woke_at > STALL_S:
                top: FrameType | None = sys._current_frames().get(self._thread_id)
                self._stacks.append((self.woke_at, "".join(traceback.format_stack(top)[-6:])))


@asynccontextmanager
async def child(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, *arguments, stdout=asyncio.subprocess.PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def gateway(fails: str, *, alias: bool) -> AsyncIterator[Gateway]:
    """Over two nodes; the first breaks off."""
    async with AsyncExitStack() as stack:
        nodes = []
        for place, name in enumerate("ab"):
            arguments = ("--serve", fails if place == 0 else "never", *(["--alias"] if alias else []))
            process = await stack.enter_async_context(child(*arguments))
            assert process.stdout is not None
            port = int(await process.stdout.readline())
            backend = BackendSpec(BackendKind.OLLAMA, (Target("127.0.0.1", port),), max_parallel=4)
            nodes.append(NodeSpec(name, backend, weight=0.001**place))
        models = (ModelSpec(MODEL, aliases=(OTHER_NAME,)),) if alias else ()
        topology = Topology("stalls", tuple(nodes), GatewaySpec(port=0, body_memory_mib=2048), models=models)
        mesh = await stack.enter_async_context(Mesh(topology))
        running = await stack.enter_async_context(Gateway(mesh))
        await mesh.wait_first_report(10.0)
        yield running


Case = tuple[str, str, str]  # route, kind of body, scenario


def cases() -> list[Case]:
    generating = STREAM_ROUTES
    others = ("/api/embed", "/v1/embeddings", "/v1/rerank", "/api/show", "/api/create", "/api/pull", "/api/delete")
    kinds = ("text", "image", "many")
    plain = [(path, kind, "plain") for path in generating for kind in kinds]
    plain += [(path, kind, "plain") for path in others for kind in ("text", "many")]
    plain += [("/v1/audio/transcriptions", "form", scenario) for scenario in ("plain", "model last")]
    special = [
        (path, kind, scenario)
        for scenario in ("model last", "failover", "cut")
        for path in ("/api/chat", "/v1/chat/completions", "/api/generate", "/v1/messages")
        for kind in kinds
    ]
    return plain + special


async def measure(case: Case, size: int, count: int, watcher: Watcher, file: Path) -> tuple[Stall, str]:
    path, kind, scenario = case
    alias = scenario == "model last"
    content = "multipart/form-data; boundary=b" if kind == "form" else "application/json"
    file.write_bytes(form(size) if kind == "form" else body(path, kind, size, count, model_last=alias))
    fails = scenario if scenario in ("cut", "failover") else "never"
    async with gateway(fails, alias=alias) as running:
        await asyncio.sleep(0.5)
        port = running.url.rpartition(":")[2]
        watcher.longest = Stall()
        query = f"?{fails}" if fails != "never" else ""
        async with child("--client", port, path + query, str(file), content) as process:
            out, _ = await process.communicate()
        stall = watcher.longest
    status, end = json.loads(out)
    problem = "" if "error" not in end else end.partition("error")[2][:150]
    return stall, f"{status} {problem}"


async def main_loop(size: int, count: int, only: str, *, stacks: bool) -> None:
    async with AsyncExitStack() as stack:
        tune_garbage_collector(stack)  # as `gpumesh up` does
        await measure_all(size, count, only, stacks=stacks)


async def measure_all(size: int, count: int, only: str, *, stacks: bool) -> None:
    watcher = Watcher()
    ticking = asyncio.create_task(watcher.tick())
    if stacks:
        threading.Thread(target=watcher.watch_stacks, daemon=True).start()
    print(f"{'route':<28}{'body':<8}{'scenario':<12}{'CPU, ms':>9}{'wall, ms':>10}  answer")
    with tempfile.TemporaryDirectory(prefix="gpumesh-bench-") as folder:
        for case in cases():
            if only and only not in " ".join(case):
                continue
            stall, answer = await measure(case, size, count, watcher, Path(folder) / "body")
            path, kind, scenario = case
            figures = f"{stall.cpu_s * 1e3:>9.0f}{stall.wall_s * 1e3:>10.0f}"
            print(f"{path:<28}{kind:<8}{scenario:<12}{figures}  {answer}", flush=True)
            if stacks and stall.cpu_s > STALL_S:
                print(stall.stack)
    ticking.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=100, help="size of a text, an image, a recording")
    parser.add_argument("--messages", type=int, default=500_000, help="how many small messages")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases that have this text in their line")
    parser.add_argument("--stacks", action="store_true", help="print where the loop was")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--alias", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    run: Callable[..., None] = uvloop.run
    if given.serve:
        ALIAS.update({"alias"} if given.alias else set())
        run(run_server(given.serve))
    elif given.client:
        port, target, file, content = given.client
        run(run_client(int(port), target, Path(file), content))
    else:
        run(main_loop(given.mib << 20, given.messages, given.only, stacks=given.stacks))


if __name__ == "__main__":
    main()
