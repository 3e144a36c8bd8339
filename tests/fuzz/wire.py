"""Cases over real sockets: what a client sends to a gateway, and a server of ours that a gateway asks.

Targets: ``request`` (all that a client sends on one connection), ``answer:PATH`` (all that a server sends for a request
to that path), ``upstream`` (the same, to the hot path's client alone), ``route:PATH`` (the body of a node's answer to a
GET that the gateway merges or shows), ``greeting`` (all that a port sends where an inference server is looked for).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gpumesh.backends.base import HttpCall
from gpumesh.backends.dialects import DIALECTS
from gpumesh.errors import BackendUnreachable, ProbeError, StreamCut
from gpumesh.mesh.requests.upstream import Upstream
from gpumesh.probes.http_client import make_http_client
from gpumesh.probes.server_inventory import ask_server
from tests.fuzz import parsers
from tests.fuzz.cases import Case
from tests.fuzz.memory import peak_mib

MODEL = "hostile:1b"  # of a node that is given no other
NUMBER = re.compile(rb"case (\d+)")  # in a prompt: which answer it gets; without one a good one
ANSWER_PATHS = tuple(parsers.STREAMS)
# What the gateway makes of the answers of all nodes: the path, and where the nodes' own answer is asked for.
MERGED = {"/api/version": "/api/version", "/api/tags": "/api/tags", "/api/ps": "/api/ps", "/v1/models": "/v1/models"}
SHOWN = ("/mesh/status", "/metrics", "/healthz")
QUIET_S = 0.3  # a client that has sent all waits so long for more
LONGEST_S = 20.0
UPSTREAM_S, UPSTREAM_S_PER_MIB, UPSTREAM_MIB = 0.5, 0.5, 16.0

GOOD = {
    "/": b"Ollama is running",
    "/api/version": parsers.VERSION,
    "/api/tags": parsers.TAGS.replace(b"qwen2.5:7b", MODEL.encode()),
    "/api/ps": parsers.PS.replace(b"qwen2.5:7b", MODEL.encode()),
    "/v1/models": parsers.MODELS.replace(b"qwen2.5:7b", MODEL.encode()),
    "/api/show": b'{"license":"MIT","details":{"family":"qwen2"},"model_info":{"general.architecture":"qwen2"}}',
}
# Each route's own good answer, for mutators to begin with.
ROUTE_SEEDS = {path: body for path, body in GOOD.items() if path != "/"}


def whole(body: bytes, kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (kind, len(body), body)


def answer_seeds(path: str) -> tuple[bytes, ...]:
    """Good answers to a request to this path, as whole HTTP answers: in one piece, in chunks, until the end."""
    kind = b"application/x-ndjson" if path.startswith("/api/") else b"text/event-stream"
    found = []
    for stream in parsers.STREAMS[path]:
        frames = re.findall(rb"[^\n]+\n+", stream)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n" % kind
        chunked = b"".join(b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames) + b"0\r\n\r\n"
        found += [whole(stream, kind), head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked, head + b"\r\n" + stream]
    return tuple(found)


def request(path: str, body: bytes, method: bytes = b"POST", more: bytes = b"") -> bytes:
    head = b"%b %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%b" % (method, path.encode(), more)
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def request_seeds(model: str) -> tuple[bytes, ...]:
    """Good requests, for a model that honest nodes have."""
    chat = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": False}).encode()
    chunked = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
    return (
        request("/api/chat", chat),
        request("/v1/chat/completions", chat, more=b"Authorization: Bearer x\r\nX-GPUMesh-Priority: batch\r\n"),
        request("/api/generate", b'{"model":"%b","prompt":"hi","stream":false}' % model.encode()),
        request("/v1/messages", chat, more=b"X-GPUMesh-Timeout: 5\r\nX-GPUMesh-Session: s\r\n"),
        chunked % (len(chat), chat),
        b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nCookie: a=b\r\n\r\n",
        b"GET /v1/models/x HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nConnection: Upgrade\r\n\r\n",
        b"HEAD / HTTP/1.0\r\nHost: localhost\r\n\r\n",
        b"OPTIONS /api/chat HTTP/1.1\r\nHost: localhost\r\nAccess-Control-Request-Method: POST\r\n\r\n",
        b"DELETE /api/blobs/sha256:0000 HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\r\n",
    )


# -- a client --------------------------------------------------------------------------------------------------------


async def send_case(port: int, case: Case) -> bytes:
    """All that comes back on a connection of its own; it is closed when nothing more comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = bytearray()

    async def listen() -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                got.extend(piece)
                del got[: max(len(got) - (1 << 20), 0)]

    listening = asyncio.create_task(listen())
    try:
        async with asyncio.timeout(LONGEST_S):
            with contextlib.suppress(ConnectionError):
                for piece in case.writes():
                    if listening.done():
                        break
                    writer.write(piece)
                    await writer.drain()
            before = -1
            while not listening.done() and len(got) != before:
                before = len(got)
                await asyncio.wait({listening}, timeout=QUIET_S)
    except TimeoutError:
        pass
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        abort(writer)
    return bytes(got)


async def send_request(
    port: int, path: str, body: bytes | None = None, *, more: bytes = b"", timeout_s: float = 20.0
) -> tuple[int, bytes]:
    """Status and body. Raises AssertionError where the gateway gives no whole answer in time."""
    method = b"GET" if body is None else b"POST"
    message = request(path, body or b"", method, more + b"Connection: close\r\n")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(message)
        async with asyncio.timeout(timeout_s):
            answer = await reader.read()
    except TimeoutError:
        raise AssertionError(f"no answer to {path} within {timeout_s:g} s") from None
    except ConnectionError:
        answer = b""
    finally:
        abort(writer)
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), f"no answer to {path}: {answer[:100]!r}"
    return int(head[9:12]), rest


# -- a server --------------------------------------------------------------------------------------------------------


def abort(writer: asyncio.StreamWriter) -> None:
    """Resets the connection. A closed transport must not be aborted: asyncio raises AttributeError then."""
    if not writer.transport.is_closing():
        writer.transport.abort()


async def close_writer(writer: asyncio.StreamWriter) -> None:
    """When all has gone out."""
    writer.close()
    await writer.wait_closed()


@dataclass
class HostileNode:
    """One node's server. It answers well, but for ``bodies`` (of a GET, by path) and for prompts that name a number of
    ``answers``."""

    model: str = MODEL
    port: int = 0
    answers: dict[int, Case] = field(default_factory=dict)
    bodies: dict[str, bytes] = field(default_factory=dict)
    request_count: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            while await self._one(reader, writer):
                pass
        await close_writer(writer)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.split(b" ", 2)
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        body = await reader.readexactly(int(length[1])) if length else b""
        name = path.decode("latin-1").partition("?")[0]
        if method == b"GET" or name == "/api/show":
            good = GOOD.get(name, b"").replace(MODEL.encode(), self.model.encode())
            found = self.bodies.get(name, good)
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n" if not found else whole(found))
            await writer.drain()
            return True
        self.request_count += 1
        number = NUMBER.search(body)
        case = None if number is None else self.answers.get(int(number[1]))
        if case is None:
            writer.write(answer_seeds(name)[0] if name in parsers.STREAMS else whole(b"{}"))
            await writer.drain()
            return True
        for piece in case.writes():
            writer.write(piece)
            await writer.drain()
        return False


ConnectionHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(speak: ConnectionHandler) -> AsyncIterator[int]:
    """A server that speaks so on each connection; its port. Nothing of it is left behind."""
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            async with asyncio.timeout(LONGEST_S):
                await speak(reader, writer)
        except (TimeoutError, ConnectionError, asyncio.CancelledError):
            pass  # it is left, or `serving` ends, and nobody else cancels it
        finally:
            tasks.discard(task)
            abort(writer)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


@contextlib.asynccontextmanager
async def hostile_node(model: str = MODEL) -> AsyncIterator[HostileNode]:
    node = HostileNode(model)
    async with serving(node.serve) as node.port:
        yield node


async def chat(
    port: int, path: str, *, stream: bool, model: str = MODEL, number: int | None = None, node: str | None = None
) -> int:
    """Asks the gateway for a hostile model, and for the answer of that number; the status. Raises AssertionError for a
    fault of the gateway's own."""
    prompt = "hi" if number is None else f"case {number}"
    body = {"model": model, "prompt": prompt, "messages": [{"role": "user", "content": prompt}], "stream": stream}
    more = b"" if node is None else b"X-GPUMesh-Node: %b\r\n" % node.encode()
    status, answer = await send_request(port, path, json.dumps(body).encode(), more=more + b"X-GPUMesh-Timeout: 1\r\n")
    assert status != 500 or b"failed inside" not in answer, f"500: {answer[:300]!r}"
    return status


async def heal(port: int, nodes: Mapping[str, str]) -> None:
    """Lets each node (name and model) answer well, so that its breaker is closed and the next case reaches it."""
    for node, model in nodes.items():
        for _ in range(50):
            if await chat(port, "/api/chat", stream=False, model=model, node=node) == 200:
                break
            await asyncio.sleep(0.1)


# -- what must hold --------------------------------------------------------------------------------------------------

_STATUS = re.compile(rb"(?:\A|\r\n\r\n|[}\n])HTTP/1\.1 (\d\d\d) ")


def statuses(answer: bytes) -> list[int]:
    return [int(found) for found in _STATUS.findall(answer)]


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


async def check_routes(port: int, honest: Sequence[str]) -> None:
    """Every merged route answers with 200 and in its form, and the honest nodes are healthy. Raises AssertionError."""
    from prometheus_client.parser import text_string_to_metric_families

    for path in (*MERGED, *SHOWN):
        status, body = await send_request(port, path)
        assert status == 200, f"{path} answers {status}: {body[:200]!r}"
        if path == "/metrics":
            list(text_string_to_metric_families(body.decode()))
            continue
        document = json.loads(body, parse_constant=_no_constant)
        body.decode().encode()
        if path == "/mesh/status":
            health = {node["name"]: node["health"] for node in document["nodes"]}
            assert all(health[name] == "healthy" for name in honest), f"an honest node is not healthy: {health}"


async def upstream(case: Case) -> None:
    """The hot path's client asks a server that says this. Raises what it does not document, and AssertionError for CPU
    time (the server's own, which is here too, is within it) or memory that is out of proportion."""
    async with hostile_node() as server, Upstream() as client:
        server.answers[1] = case
        before_mib = peak_mib(reset=True)
        began = time.process_time()
        with contextlib.suppress(BackendUnreachable, StreamCut):
            async with asyncio.timeout(LONGEST_S):
                call = HttpCall("POST", "/api/chat", b"case 1")
                answer = await client.request(server.url, call, (), node="fuzzed", server_name=None)
                while await answer.read():
                    pass
        cpu_s, memory_mib = time.process_time() - began, peak_mib() - before_mib
    limit_s = UPSTREAM_S + UPSTREAM_S_PER_MIB * case.size / (1 << 20)
    assert cpu_s <= limit_s, f"{cpu_s:.2f} s of CPU time for {case.size} bytes ({limit_s:.2f} are allowed)"
    limit_mib = UPSTREAM_MIB + 4 * sum(part.size for part in case.parts if not part.apart) / (1 << 20)  # our own copies
    assert memory_mib <= limit_mib, f"{memory_mib:.0f} MiB for {case.size} bytes ({limit_mib:.0f} are allowed)"


async def greet(case: Case, *, timeout_s: float = 2.0) -> None:
    """Looks for an inference server where one says this. Raises what is not ProbeError."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 12)
        for piece in case.writes():
            writer.write(piece)
            await writer.drain()
        await close_writer(writer)

    async with serving(speak) as port, make_http_client() as client:
        for kind in DIALECTS:
            with contextlib.suppress(ProbeError):
                await ask_server(client, kind, f"http://127.0.0.1:{port}", None, api_key=None, timeout_s=timeout_s)


GREETING_SEEDS = (
    b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
    b"-ERR unknown command 'GET'\r\n",
    b"220 mail.example ESMTP\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: https://login.example/\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\n\r\n<html><title>502</title>",
    b"HTTP/1.1 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n",
    b"\x15\x03\x01\x00\x02\x02\x46",
    whole(parsers.TAGS[:-1] + b',"version":"0.12.6","data":[]}'),
)
