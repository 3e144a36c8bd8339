"""One node's model store, through Ollama's API on it, straight through the forwarded port. Raises BackendError.

What a server says is cleaned here, before it becomes a message or a step of progress.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from gpumesh import config
from gpumesh.backends import safe_json
from gpumesh.backends.frames import LineSplitter
from gpumesh.backends.model_list import MAX_CONTEXT_TOKENS
from gpumesh.errors import BackendError, BackendUnreachable, ProbeError
from gpumesh.printable import printable
from gpumesh.state import BackendPhase, MeshState, NodeState

if TYPE_CHECKING:
    import httpx

    from gpumesh.topology import Topology

LOAD_TIMEOUT_S = 600.0  # between two lines of progress, or for a model to come from a slow disk
LINE_LIMIT = 1 << 20
MAX_ERROR_BYTES = 4096
MAX_CONCURRENT_SHOWS = 8  # of one node
CONTEXT_LENGTHS_TIMEOUT_S = 5.0  # for the context lengths of all models: what is not known by then stays unknown
SHOW_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class PullProgress:
    """A line of Ollama's progress. ``completed_bytes`` and ``total_bytes`` are bytes of the layer that ``status``
    names."""

    status: str
    completed_bytes: int | None = None
    total_bytes: int | None = None


class ModelStoreClient:
    """The stores of a mesh's nodes. ``client`` stays its owner's to close."""

    def __init__(self, client: httpx.AsyncClient, topology: Topology) -> None:
        self._client = client
        self._topology = topology

    async def refresh_backends(self, state: MeshState) -> MeshState:
        """The state with what the servers that are up say of their models now: the mesh's own look may be some seconds
        old, and miss what the command before this one did."""
        nodes = await asyncio.gather(*(self._look(node) for node in state.nodes))
        return replace(state, at=datetime.now(UTC), nodes=tuple(nodes))

    async def _look(self, node: NodeState) -> NodeState:
        from gpumesh.probes.backend import probe_backend

        if node.backend.state is not BackendPhase.UP or node.backend.url is None:
            return node
        spec = self._topology.node(node.name).backend
        key = None if spec.api_key_env is None else config.read_secret(spec.api_key_env, node=node.name)
        report = await probe_backend(
            self._client, spec, [node.backend.url], api_key=key, timeout_s=SHOW_TIMEOUT_S, node=node.name
        )
        return replace(node, backend=report.state) if report.state.state is BackendPhase.UP else node

    async def pull(self, node: NodeState, model: str) -> AsyncGenerator[PullProgress]:
        """Ends when the model is there. Closing it stops the download; Ollama goes on from there the next time."""
        last: PullProgress | None = None
        async with aclosing(self._lines(node, "POST", "/api/pull", {"model": model})) as lines:
            async for line in lines:
                step = parse_progress(line)
                if step is not None:
                    yield (last := step)
        if last is None or last.status != "success":
            raise BackendError("the server ended the download without saying that it is complete", node=node.name)

    async def remove(self, node: NodeState, model: str) -> None:
        await self._ask(node, "DELETE", "/api/delete", {"model": model})

    async def load(self, node: NodeState, model: str, *, embedder: bool, keep_alive: str | None) -> None:
        body: dict[str, Any] = {"model": model}
        if keep_alive is not None:
            body["keep_alive"] = _duration(keep_alive)
        if embedder:
            await self._ask(node, "POST", "/api/embed", {**body, "input": []})
        else:
            await self._ask(node, "POST", "/api/generate", {**body, "stream": False})

    async def unload(self, node: NodeState, model: str, *, embedder: bool) -> None:
        await self.load(node, model, embedder=embedder, keep_alive="0")

    async def context_lengths(self, asked: Sequence[tuple[NodeState, str]]) -> dict[tuple[str, str], int]:
        """By node and model, those that their servers say in time: a node that lists thousands of models, or is slow,
        takes neither the others' connections nor their time."""
        gates = {node.name: asyncio.Semaphore(MAX_CONCURRENT_SHOWS) for node, _ in asked}
        found: dict[tuple[str, str], int] = {}

        async def ask(node: NodeState, model: str) -> None:
            async with gates[node.name]:
                length = await self.context_length(node, model)
            if length:
                found[node.name, model] = length

        tasks = [asyncio.create_task(ask(node, model)) for node, model in asked]
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=CONTEXT_LENGTHS_TIMEOUT_S)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return found

    async def context_length(self, node: NodeState, model: str) -> int | None:
        """The longest context that the model was made for, tokens; ``None`` when its server does not say in time."""
        try:
            async with asyncio.timeout(SHOW_TIMEOUT_S):
                return parse_context_length(await self._ask(node, "POST", "/api/show", {"model": model}))
        except (BackendError, TimeoutError):
            return None

    async def _ask(self, node: NodeState, method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The last line of the answer."""
        last: dict[str, Any] = {}
        async with aclosing(self._lines(node, method, path, body)) as lines:
            async for line in lines:
                last = line or last
        return last

    async def _lines(
        self, node: NodeState, method: str, path: str, body: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any]]:
        import httpx

        variable = self._topology.node(node.name).backend.api_key_env
        key = None if variable is None else config.read_secret(variable, node=node.name)
        headers = {"Accept-Encoding": "identity"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = self._client.build_request(method, f"{node.backend.url}{path}", json=dict(body), headers=headers)
        try:
            response = await self._client.send(request, stream=True)
            try:
                lines = LineSplitter(LINE_LIMIT)
                async for piece in response.aiter_raw():
                    for line in lines.feed(piece):
                        yield parse_line(line, response.status_code, node.name)
                yield parse_line(lines.take_rest(), response.status_code, node.name)
            finally:
                await response.aclose()
        except ProbeError as error:
            raise BackendError("the server's answer is not what Ollama would say", node=node.name) from error
        except httpx.HTTPError as error:
            said = printable(str(error), 1000) or type(error).__name__
            raise BackendUnreachable(f"no answer: {said}", node=node.name) from error


@asynccontextmanager
async def open_model_stores(topology: Topology) -> AsyncIterator[ModelStoreClient]:
    import httpx

    from gpumesh.probes.http_client import http_client

    async with http_client(timeout=httpx.Timeout(30.0, read=LOAD_TIMEOUT_S)) as client:
        yield ModelStoreClient(client, topology)


def parse_line(line: bytes, status: int, node: str) -> dict[str, Any]:
    """A line of an answer, empty for one that says nothing. Raises BackendError for one that tells of an error."""
    entry = safe_json.parse_report(line) or {} if line.strip() else {}
    if not entry and status >= 400 and safe_json.parse(line) is None:
        entry = {"error": line[:MAX_ERROR_BYTES].decode("utf-8", "replace")}
    if "error" in entry or status >= 400:
        said = printable(_text(entry.get("error")) or f"status {status}", 300)
        raise BackendError(said, hint=_hint(said), node=node)
    return entry


def _text(error: Any) -> str:
    try:
        return str(error or "")
    except RecursionError:  # lists in lists in lists
        return "an error that cannot be read"


def _hint(said: str) -> str | None:
    if "no space left" in said:
        return "its disk is full: `gpumesh exec NODE -- df -h`, and `gpumesh models rm` what is not needed"
    if "file does not exist" in said:
        return "no such model in Ollama's library: look at https://ollama.com/library for its name and tags"
    return None


def parse_progress(entry: Mapping[str, Any]) -> PullProgress | None:
    said = entry.get("status")
    if not isinstance(said, str):
        return None
    whole = safe_json.as_count(entry.get("total"))
    if not whole:
        return PullProgress(printable(said, 60))
    return PullProgress(printable(said, 60), min(safe_json.as_count(entry.get("completed")) or 0, whole), whole)


def parse_context_length(entry: Mapping[str, Any]) -> int | None:
    """``model_info`` has the length under the name of the architecture: ``qwen2.context_length``."""
    info = entry.get("model_info")
    if not isinstance(info, dict):
        return None
    lengths = (value for key, value in info.items() if str(key).endswith(".context_length"))
    return next(
        (length for value in lengths if (length := safe_json.as_bounded_count(value, MAX_CONTEXT_TOKENS))), None
    )


def _duration(text: str) -> str | int:
    """A number is seconds and -1 for ever, to Ollama; anything else is a duration such as ``30m``."""
    try:
        return int(text)
    except ValueError:
        return text
