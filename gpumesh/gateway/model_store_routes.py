"""What changes the nodes' model stores, with a clear meaning over several nodes.

The client may name one node (``X-GPUMesh-Node``); then the request means that node alone. Otherwise:

- ``pull``: to every Ollama node that can be used now; done when all of them have it.
- ``create``: on every node that has what it is made from: all blobs of ``files`` and ``adapters``, else the model that
  ``from`` names; if none has that, on all, which fetch it as Ollama does.
- ``copy``: on every node that has the source. So a name that works on one node does so wherever the other works.
- ``delete``: from every node that has it; 404 if none. A node that has it and cannot be reached is an error, after it
  was deleted from the others: it would come back with that node.
- ``push``: from one node that has it.
- blobs, which only ``create`` uses: ``HEAD`` is 200 if every node that can say so has the blob, else 404, so that the
  client sends it; ``POST`` then passes it on, as it comes, to those that lack it, and is 201 when all have it.

What is partly done is an error that says where it was done and where not, never a success. When ``success`` is told,
the mesh knows already what the store has now: a chat with a model that was just pulled finds it.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gpumesh.backends import safe_json
from gpumesh.backends.base import HttpCall
from gpumesh.backends.dialects import MODEL_STORE_DIALECT
from gpumesh.backends.frames import LineSplitter
from gpumesh.balancer.base import Candidate, Demand
from gpumesh.balancer.select import has_model, no_node_error
from gpumesh.errors import BackendError, GPUMeshError, ProbeError
from gpumesh.gateway import error_shapes
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import HeaderPairs, Response, json_response
from gpumesh.gateway.http.streaming_response import StreamingResponse
from gpumesh.gateway.json_members import read_members, rewrite_body
from gpumesh.gateway.merged_progress import MergedProgress
from gpumesh.gateway.model_requests import OLLAMA_ONLY, ClientApi, read_node, read_timeout
from gpumesh.gateway.proxy import build_call
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.requests.answer import Answer

T = TypeVar("T")

TIMEOUT_S = 86400.0  # a pull takes as long as it takes
BLOB_CHECK_S = 30.0
MAX_TRIES = 5  # of one node's pull; Ollama goes on where it was cut
PAUSE_S = 1.0
LINE_BYTES = 1 << 20
LINES_AT_ONCE = 100
ANSWER_BYTES = 1 << 20  # of a node's answer that is no progress
DOCUMENT_COST = 32 << 20  # bytes, as jsons.cost has it: a Modelfile with all its messages and licences is far from it
LANE_PIECES = 4  # held for a node that is slower than the client, of about 64 KiB each
NDJSON = "application/x-ndjson"
_JSON = (("Content-Type", "application/json"),)
_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class NodeResult:
    """One node's answer; ``body`` in its own words, or in ours if it gave none."""

    node: str
    status: int
    body: bytes

    @property
    def error_text(self) -> str:
        return MODEL_STORE_DIALECT.error_text(self.status, self.body)


@dataclass(frozen=True, slots=True)
class _Holders:
    """Which nodes have a blob, which lack it, and the errors of those that did not say: a node that talks nonsense must
    not keep a blob from the others."""

    having: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    unsure: list[NodeResult] = field(default_factory=list)


class ModelStoreRoutes:
    def __init__(self, mesh: Mesh, *, pause_s: float = PAUSE_S) -> None:
        self._mesh = mesh
        self._pause_s = pause_s

    # -- which nodes ---------------------------------------------------------------------------------------------

    def _candidates(self) -> list[Candidate]:
        enabled = {node.name for node in self._mesh.topology.nodes if node.enabled}
        return [one for one in self._mesh.candidates() if one.kind in OLLAMA_ONLY and one.name in enabled]

    def _all(self, named: str | None) -> list[str]:
        """The named node, or all that can be used. Raises NoNodeError."""
        nodes = [one.name for one in self._candidates() if one.usable and named in (None, one.name)]
        if not nodes:
            raise no_node_error(self._mesh.candidates(), Demand(None, OLLAMA_ONLY, named))
        return nodes

    def _holding(self, model: str, named: str | None) -> list[str]:
        """Those of them that have the model. Raises ModelMissing."""
        usable = {one.name: one for one in self._candidates() if one.usable}
        nodes = [name for name in self._all(named) if has_model(usable[name], model)]
        if not nodes:
            raise no_node_error(self._mesh.candidates(), Demand(model, OLLAMA_ONLY, named))
        return nodes

    # -- routes --------------------------------------------------------------------------------------------------

    async def pull(self, request: Request) -> Response | StreamingResponse:
        named, (document, _) = read_node(request.headers, self._mesh.topology), await _document(request)
        _model(document, "model", "name")
        nodes = self._all(named)
        away = [one.name for one in self._candidates() if not one.usable] if named is None else []
        return await self._follow(request, document, nodes, "pulled", away=away)

    async def push(self, request: Request) -> Response | StreamingResponse:
        named, (document, _) = read_node(request.headers, self._mesh.topology), await _document(request)
        nodes = self._holding(_model(document, "model", "name"), named)
        return await self._follow(request, document, nodes[:1], "pushed")

    async def create(self, request: Request) -> Response | StreamingResponse:
        named, (document, _) = read_node(request.headers, self._mesh.topology), await _document(request)
        _model(document, "model", "name")
        nodes = self._all(named)
        digests = {digest for key in ("files", "adapters") for digest in _digests(document.get(key))}
        base = document.get("from")
        if digests:
            nodes = await self._with_blobs(nodes, digests) or nodes
        elif isinstance(base, str):
            usable = {one.name: one for one in self._candidates()}
            nodes = [name for name in nodes if has_model(usable[name], base)] or nodes
        return await self._follow(request, document, nodes, "created")

    async def copy(self, request: Request) -> Response:
        named, (document, body) = read_node(request.headers, self._mesh.topology), await _document(request)
        nodes = self._holding(_model(document, "source"), named)
        return await self._settle(nodes, await self._each(nodes, build_call(request, body), request), "copied")

    async def delete(self, request: Request) -> Response:
        named, (document, body) = read_node(request.headers, self._mesh.topology), await _document(request)
        model = _model(document, "model", "name")
        nodes = self._holding(model, named)
        away = [
            NodeResult(one.name, 503, b'{"error":"it cannot be reached now"}')
            for one in self._candidates()
            if not one.usable and named is None and one.models is not None and has_model(one, model)
        ]
        results = await self._each(nodes, build_call(request, body), request)
        return await self._settle(nodes, [*results, *away], "deleted")

    async def has_blob(self, request: Request) -> Response:
        nodes = self._all(read_node(request.headers, self._mesh.topology))
        holders = await self._holders(nodes, _blob_path(request))
        if len(holders.unsure) == len(nodes):
            raise BackendError(holders.unsure[0].error_text, node=holders.unsure[0].node)
        return Response(status=404 if holders.lacking else 200, headers=_by(holders.having))

    async def add_blob(self, request: Request) -> Response:
        nodes = self._all(read_node(request.headers, self._mesh.topology))
        holders = await self._holders(nodes, _blob_path(request))
        if not holders.lacking and not holders.unsure:
            return Response(status=200, headers=_by(nodes))
        results = await self._pass_on(request, holders.lacking) if holders.lacking else []
        results += holders.unsure
        if all(one.status < 300 for one in results):
            return Response(status=201, headers=_by(nodes))
        return _told(results, "stored")

    # -- one request to several nodes ----------------------------------------------------------------------------

    async def _each(self, nodes: Iterable[str], call: HttpCall, request: Request) -> list[NodeResult]:
        timeout_s = read_timeout(request.headers, TIMEOUT_S)
        return list(await asyncio.gather(*(self._ask(node, call, timeout_s) for node in nodes)))

    async def _ask(self, node: str, call: HttpCall, timeout_s: float) -> NodeResult:
        demand = Demand(None, OLLAMA_ONLY, node, needs_slot=False)
        calls = dict.fromkeys(OLLAMA_ONLY, call)
        return await _result(node, lambda: self._mesh.send(demand, calls, timeout_s=timeout_s, at_most_once=True))

    async def _settle(self, nodes: Sequence[str], results: Sequence[NodeResult], verb: str) -> Response:
        """Done where it could be; a node that had lost the model meanwhile does not matter."""
        await self._mesh.refresh(nodes)
        done = [one for one in results if one.status < 300]
        if done and all(one.status < 300 or one.status == 404 for one in results):
            return Response(status=done[0].status, headers=_by([one.node for one in done]))  # Ollama's have no body
        return _told(results, verb)

    async def _holders(self, nodes: Iterable[str], path: str) -> _Holders:
        results = await asyncio.gather(*(self._ask(node, HttpCall("HEAD", path), BLOB_CHECK_S) for node in nodes))
        holders = _Holders()
        for one in results:
            if one.status == 200:
                holders.having.append(one.node)
            elif one.status == 404:
                holders.lacking.append(one.node)
            else:
                message = f"{one.node} did not say whether it has the blob: {one.error_text}"
                holders.unsure.append(
                    NodeResult(one.node, 502, error_shapes.error_body(ClientApi.OLLAMA, 502, message))
                )
        return holders

    async def _with_blobs(self, nodes: Collection[str], digests: Iterable[str]) -> list[str]:
        lacking: set[str] = set()
        for digest in digests:
            left = [node for node in nodes if node not in lacking]
            lacking.update(left)
            lacking.difference_update((await self._holders(left, f"/api/blobs/{digest}")).having)
        return [node for node in nodes if node not in lacking]

    async def _pass_on(self, request: Request, nodes: Sequence[str]) -> list[NodeResult]:
        """The body to all of them as it comes; the slowest sets the pace, one that fails drops out."""
        path = _blob_path(request)
        lanes = {node: _Lane() for node in nodes}
        timeout_s = read_timeout(request.headers, TIMEOUT_S)

        async def send(node: str) -> NodeResult:
            try:
                return await _result(node, lambda: self._mesh.upload(node, path, lanes[node], timeout_s=timeout_s))
            finally:
                lanes[node].close()

        tasks = [asyncio.create_task(send(node), name=f"blob to {node}") for node in nodes]
        try:
            async for piece in request.read_body_pieces():
                for lane in lanes.values():
                    await lane.put(piece)
                if all(task.done() for task in tasks):
                    break  # nobody wants the rest
            for lane in lanes.values():
                await lane.put(b"")
            return list(await asyncio.gather(*tasks))
        finally:
            await _end(tasks)

    # -- progress ------------------------------------------------------------------------------------------------

    async def _follow(
        self,
        request: Request,
        document: Mapping[str, Any],
        nodes: Sequence[str],
        verb: str,
        *,
        away: Sequence[str] = (),
    ) -> Response | StreamingResponse:
        """Starts it on all nodes and tells the client of all as of one."""
        timeout_s = read_timeout(request.headers, TIMEOUT_S)
        call = HttpCall("POST", request.path, safe_json.dump_compact({**document, "stream": True}), _JSON)
        work = _Work(MergedProgress(nodes))
        for name in away:
            work.progress.add_note(f"{name} cannot be used now and is left out")
        tasks = [asyncio.create_task(self._one(node, call, work, timeout_s), name=f"{verb} {node}") for node in nodes]
        for task in tasks:
            task.add_done_callback(lambda _: work.changed.set())
        stream: StreamingResponse | None = None
        try:
            over = False
            while not over:
                await work.changed.wait()
                work.changed.clear()
                over = all(task.done() for task in tasks)
                lines = work.progress.take_lines()
                if lines and document.get("stream") is not False:
                    stream = stream or _begun(request, nodes)
                    stream.write(b"".join(safe_json.dump_compact(line) + b"\n" for line in lines))
                    await stream.drain()
            for task in tasks:
                task.result()
            await self._mesh.refresh(work.progress.done)
        finally:
            await _end(tasks)
        return _ended(request, stream, work, nodes, verb, streamed=document.get("stream") is not False)

    async def _one(self, node: str, call: HttpCall, work: _Work, timeout_s: float) -> None:
        """One node's part; a pull is begun anew when the way to it was lost, nothing else is."""
        demand = Demand(None, OLLAMA_ONLY, node, needs_slot=False)
        words = ""
        calls = dict.fromkeys(OLLAMA_ONLY, call)
        for tried in range(MAX_TRIES if call.path == "/api/pull" else 1):
            if tried:
                await asyncio.sleep(self._pause_s * 2 ** (tried - 1))
            try:
                answer = await self._mesh.send(demand, calls, timeout_s=timeout_s, at_most_once=True)
                if answer.status >= 400:
                    work.refused[node] = NodeResult(node, answer.status, await answer.read_at_most(ANSWER_BYTES) or b"")
                    work.fail(node, work.refused[node].error_text)
                    return
                await work.read(node, answer)
            except BackendError as error:
                words = error.message
            except GPUMeshError as error:
                words = error.message
                break
            else:
                if work.over(node):
                    return
                words = "it ended before it was done"
        work.fail(node, words)


class _Work:
    """What several nodes' tasks tell the one that writes to the client."""

    def __init__(self, progress: MergedProgress) -> None:
        self.progress = progress
        self.changed = asyncio.Event()
        self.refused: dict[str, NodeResult] = {}
        self.changed.set()

    def over(self, node: str) -> bool:
        return node in self.progress.done or node in self.progress.failures

    def fail(self, node: str, words: str) -> None:
        self.progress.mark_failed(node, words)
        self.changed.set()

    async def read(self, node: str, answer: Answer) -> None:
        try:
            async for line in _lines(answer):
                entry = safe_json.parse_object(line)
                if entry is not None:
                    self.progress.feed_line(node, entry)
                    self.changed.set()
        finally:
            await answer.aclose()


class _Lane:
    """Pieces of a body on their way to one node: an async iterable of them, which ends with an empty one."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._moved = asyncio.Event()
        self._closed = False

    async def put(self, piece: bytes) -> None:
        """Waits while the node is slow; what is for a node that is gone is dropped."""
        while len(self._pieces) >= LANE_PIECES and not self._closed:
            await self._wait()
        if not self._closed:
            self._pieces.append(piece)
            self._moved.set()

    def close(self) -> None:
        self._closed = True
        self._pieces.clear()
        self._moved.set()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while not self._closed:
            if not self._pieces:
                await self._wait()
                continue
            piece = self._pieces.popleft()
            self._moved.set()
            if not piece:
                return
            yield piece

    async def _wait(self) -> None:
        self._moved.clear()
        await self._moved.wait()


async def _result(node: str, ask: Callable[[], Awaitable[Answer]]) -> NodeResult:
    try:
        answer = await ask()
        return NodeResult(node, answer.status, await answer.read_at_most(ANSWER_BYTES) or b"")
    except GPUMeshError as error:
        status = error_shapes.error_status(error)
        return NodeResult(node, status, error_shapes.error_body(ClientApi.OLLAMA, status, error.message))


async def _lines(answer: Answer) -> AsyncIterator[bytes]:
    lines = LineSplitter(LINE_BYTES)
    async for piece in answer:
        try:
            whole = lines.feed(piece)
        except ProbeError as error:
            raise BackendError("the answer is not what Ollama would say", node=answer.node) from error
        for number, line in enumerate(whole, 1):
            yield line
            if number % LINES_AT_ONCE == 0:
                await asyncio.sleep(0)  # a piece may hold thousands
    yield lines.take_rest()


def _begun(request: Request, nodes: Sequence[str]) -> StreamingResponse:
    return request.start_stream((("Content-Type", NDJSON), *_by(nodes)))


def _ended(
    request: Request, stream: StreamingResponse | None, work: _Work, nodes: Sequence[str], verb: str, *, streamed: bool
) -> Response | StreamingResponse:
    failures = work.progress.failures
    status, last = 200, {"status": "success"}
    if failures:
        same = len(failures) == len(nodes) and len(set(failures.values())) == 1
        refused = next(iter(work.refused.values()), None)
        if same and refused is not None and stream is None:
            body = error_shapes.error_body(ClientApi.OLLAMA, refused.status, refused.error_text)
            return json_response(body, status=refused.status, headers=_by(nodes))
        status = 500 if same else 502
        last = {"error": next(iter(failures.values())) if same else _partly(verb, work.progress.done, failures)}
    line = safe_json.dump_compact(last)
    if stream is None and (failures or not streamed):
        return json_response(line, status=status, headers=_by(nodes))
    stream = stream or _begun(request, nodes)
    stream.write(line + b"\n")
    stream.finish()
    return stream


def _told(results: Sequence[NodeResult], verb: str) -> Response:
    """What did not work everywhere; if all nodes said the same, in their own words, though not in their bytes."""
    first = results[0]
    names = _by([one.node for one in results])
    if all((one.status, one.error_text) == (first.status, first.error_text) for one in results):
        body = error_shapes.error_body(ClientApi.OLLAMA, first.status, first.error_text)
        return json_response(body, status=first.status, headers=names)
    failures = {one.node: one.error_text for one in results if one.status >= 300}
    words = _partly(verb, [one.node for one in results if one.status < 300], failures)
    return json_response(error_shapes.error_body(ClientApi.OLLAMA, 502, words), status=502, headers=names)


def _partly(verb: str, done: Sequence[str], failures: Mapping[str, str]) -> str:
    told = "; ".join(f"{node}: {words}" for node, words in failures.items())
    return f"{verb} on {', '.join(done) or 'no node'}; not on {told}"


def _by(nodes: Iterable[str]) -> HeaderPairs:
    return (("X-GPUMesh-Node", ", ".join(nodes)),)


def _blob_path(request: Request) -> str:
    path = request.path
    if not _DIGEST.fullmatch(path.removeprefix("/api/blobs/")):
        raise BadRequest("invalid digest format")
    return path


async def _document(request: Request) -> tuple[dict[str, Any], bytes]:
    """The body, each member by Ollama's name for it, as a document and as it is sent on. Raises BadRequest."""
    body = await request.read_body()
    members = await read_members(body, request)
    if not members.has_common_spelling:
        body = await rewrite_body(body, members, request)
    cost = safe_json.estimate_memory(body, DOCUMENT_COST)
    if cost is None:
        raise BadRequest("the request body is too large", status=413)
    request.reserve_memory(cost)
    document = safe_json.parse_object(body)
    if document is None:
        raise BadRequest("the request body is not JSON")
    return document, body


def _model(document: Mapping[str, Any], *keys: str) -> str:
    for key in keys:
        value = document.get(key)
        if isinstance(value, str) and value.strip():
            return value
    raise BadRequest(f"{keys[0]} is required")


def _digests(files: object) -> list[str]:
    """Of ``{"name": "sha256:…"}``. Raises BadRequest for what is none: it becomes a part of a path."""
    digests = list(files.values()) if isinstance(files, dict) else []
    for digest in digests:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise BadRequest("invalid digest format")
    return digests


async def _end(tasks: Sequence[asyncio.Task[T]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
