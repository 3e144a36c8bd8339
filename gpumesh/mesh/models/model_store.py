"""One node's model store: pulls, removes, loads and describes models through Ollama's API on that node.

A store reaches its node only through a function that sends requests. The function of ``over_mesh`` sends as the gateway
does: with a lease on the node, in the process that runs the mesh. The function of ``over_url`` sends straight to the
forwarded port, from any process that runs a command.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from gpumesh import config
from gpumesh.backends import safe_json
from gpumesh.backends.base import HttpCall
from gpumesh.backends.dialects import KINDS_WITH_MODEL_STORE
from gpumesh.balancer.base import Demand
from gpumesh.errors import BackendError, BackendUnreachable, GPUMeshError
from gpumesh.mesh.models import store_answers
from gpumesh.mesh.models.store_answers import SUCCESS, NodeResult, StoreAnswer, StoreRefusal, StoreStep
from gpumesh.text.printable import printable

if TYPE_CHECKING:
    import httpx

    from gpumesh.mesh.mesh import Mesh

OPERATION_TIMEOUT_S = 86400.0  # a day: a large model over a slow line takes hours
SHOW_TIMEOUT_S = 3.0
JSON_HEADERS = (("Content-Type", "application/json"),)


class SendToNode(Protocol):
    """Sends a request to one node's server, and returns the answer. Raises GPUMeshError if there is no answer."""

    async def __call__(self, call: HttpCall, *, timeout_s: float) -> StoreAnswer: ...


class ModelStore:
    """The model store of ``node``. Unless a method says otherwise, it raises BackendError with the server's own reason,
    or another GPUMeshError if the server cannot be asked."""

    def __init__(self, node: str, send: SendToNode) -> None:
        self.node = node
        self._send = send

    def __repr__(self) -> str:
        return f"<ModelStore {self.node}>"

    # -- requests of any kind ------------------------------------------------------------------------------------

    async def follow(self, call: HttpCall, *, timeout_s: float = OPERATION_TIMEOUT_S) -> AsyncGenerator[StoreStep]:
        """Starts a ``pull``, ``push`` or ``create``, and yields its steps until the server ends the stream. If the
        operation is complete, its last step has the status ``SUCCESS``.

        Closing the generator ends the operation. Raises StoreRefusal when the server refuses or gives up.
        """
        answer = await self._send(call, timeout_s=timeout_s)
        if answer.status >= 400:
            text = store_answers.read_error_text(answer.status, await store_answers.read_body(answer) or b"")
            raise StoreRefusal(text, node=self.node, status=answer.status)
        try:
            async for line in store_answers.read_lines(answer, self.node):
                step = store_answers.parse_step(line, self.node)
                if step is not None:
                    yield step
        finally:
            await answer.aclose()

    async def request(self, call: HttpCall, *, timeout_s: float = OPERATION_TIMEOUT_S) -> NodeResult:
        """Sends a request, and returns the HTTP status and the error message of its answer. Never raises because of
        what the node does: if there is no answer, the result has the error."""
        try:
            answer = await self._send(call, timeout_s=timeout_s)
            body = await store_answers.read_body(answer) or b""  # b"": it is too long, so only the status counts
        except GPUMeshError as error:
            return store_answers.failed_result(self.node, error)
        return store_answers.answered_result(self.node, answer.status, body)

    async def _ask(self, method: str, path: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a JSON document, and returns the answer's JSON object; empty if the answer is none. Raises StoreRefusal
        if the server refuses, and BackendError if the answer is too long."""
        answer = await self._send(json_call(method, path, document), timeout_s=OPERATION_TIMEOUT_S)
        body = await store_answers.read_body(answer)
        if body is None:
            raise store_answers.not_ollama_error(self.node)
        return store_answers.parse_document(answer.status, body, self.node)

    # -- operations ----------------------------------------------------------------------------------------------

    async def pull(self, model: str) -> AsyncGenerator[StoreStep]:
        """Downloads the model to the node, and yields the steps until the node has it. Closing the generator stops the
        download; the next pull continues where it stopped."""
        last_step: StoreStep | None = None
        async with aclosing(self.follow(json_call("POST", "/api/pull", {"model": model}))) as steps:
            async for step in steps:
                last_step = step
                yield step
        if last_step is None or last_step.status != SUCCESS:
            raise BackendError("the server ended the download without saying that it is complete", node=self.node)

    async def remove(self, model: str) -> None:
        """Deletes the model from the node's disk."""
        await self._ask("DELETE", "/api/delete", {"model": model})

    async def load(self, model: str, *, embedder: bool, keep_alive: str | None, context: int | None = None) -> None:
        """Loads the model into GPU memory. ``embedder``: the model turns text into vectors, and needs another request.
        ``keep_alive``: how long the model stays there without use; ``context``: its context in tokens. ``None`` leaves
        this to the server."""
        document: dict[str, Any] = {"model": model}
        if keep_alive is not None:
            document["keep_alive"] = _parse_keep_alive(keep_alive)
        if context is not None:
            document["options"] = {"num_ctx": context}
        if embedder:
            await self._ask("POST", "/api/embed", {**document, "input": []})  # without input it only loads
        else:
            await self._ask("POST", "/api/generate", {**document, "stream": False})  # without a prompt it only loads

    async def unload(self, model: str, *, embedder: bool) -> None:
        """Removes the model from GPU memory. ``embedder`` as for ``load``."""
        await self.load(model, embedder=embedder, keep_alive="0")  # 0 s without use: Ollama unloads it at once

    async def context_length(self, model: str) -> int | None:
        """The longest context that the model was made for, in tokens; ``None`` if the server does not say it, or not in
        time."""
        try:
            async with asyncio.timeout(SHOW_TIMEOUT_S):
                return store_answers.parse_context_length(await self._ask("POST", "/api/show", {"model": model}))
        except (BackendError, TimeoutError):  # the figure is only shown to people, so it may be missing
            return None


def json_call(method: str, path: str, document: Mapping[str, Any]) -> HttpCall:
    """A request whose body is ``document`` as JSON."""
    return HttpCall(method, path, safe_json.dump_compact(document), JSON_HEADERS)


def _parse_keep_alive(text: str) -> str | int:
    """The value that Ollama expects for this text: a number of seconds (-1 means for ever), or a text for a duration
    such as ``30m``. (Ollama refuses a number in a text: ``"30"``.)"""
    try:
        return int(text)
    except ValueError:  # a duration with its unit; the server refuses any other text
        return text


# -- functions that send requests ------------------------------------------------------------------------------------


def over_mesh(mesh: Mesh, node: str) -> SendToNode:
    """A function that sends to ``node`` through a mesh that runs in this process. It sends no request twice, because
    the first request may already have changed the store."""
    demand = Demand(None, KINDS_WITH_MODEL_STORE, node, needs_slot=False)

    async def send(call: HttpCall, *, timeout_s: float) -> StoreAnswer:
        calls = dict.fromkeys(KINDS_WITH_MODEL_STORE, call)
        return await mesh.send(demand, calls, timeout_s=timeout_s, at_most_once=True)

    return send


def over_url(client: httpx.AsyncClient, url: str, *, node: str, api_key_env: str | None) -> SendToNode:
    """A function that sends straight to ``url``, where the node's server answers. The time-outs of ``client`` apply:
    they limit the time between two pieces of an answer, not the whole time."""

    async def send(call: HttpCall, *, timeout_s: float) -> StoreAnswer:  # noqa: ARG001  # the client's time-outs apply
        """Sends the call to the server at ``url``, with the node's API key."""
        import httpx

        key = None if api_key_env is None else config.read_secret(api_key_env, node=node)
        headers = {"Accept-Encoding": "identity", **dict(call.headers)}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = client.build_request(call.method, f"{url}{call.path}", content=call.body, headers=headers)
        try:
            return _UrlAnswer(await client.send(request, stream=True), node)
        except httpx.HTTPError as error:
            raise _no_answer_error(error, node) from error

    return send


class _UrlAnswer:
    """httpx's response as a StoreAnswer."""

    def __init__(self, response: httpx.Response, node: str) -> None:
        self.status = response.status_code
        self._response = response
        self._node = node

    async def __aiter__(self) -> AsyncIterator[bytes]:
        import httpx

        try:
            async for piece in self._response.aiter_raw():
                yield piece
        except httpx.HTTPError as error:
            raise _no_answer_error(error, self._node) from error

    async def aclose(self) -> None:
        await self._response.aclose()


def _no_answer_error(error: Exception, node: str) -> BackendUnreachable:
    """httpx's ``error`` as an error of ours."""
    reason = printable(str(error), 1000) or type(error).__name__
    return BackendUnreachable(f"no answer: {reason}", node=node)
