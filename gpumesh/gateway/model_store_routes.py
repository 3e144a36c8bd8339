"""Ollama's routes that change model stores: pull, push, create, copy, delete and blobs.

A client may name one node (``X-GPUMesh-Node``). ``gpumesh/mesh/models/fleet_store.py`` defines what a request means
over several nodes, and carries it out. The code here reads the requests, and writes the results as HTTP answers and
lines of NDJSON. If an operation succeeds on some nodes only, the client never gets a success, but an error that names
the nodes where the operation succeeded and the nodes where it failed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from gpumesh.backends import safe_json
from gpumesh.backends.base import HttpCall
from gpumesh.errors import BackendError
from gpumesh.gateway import error_shapes
from gpumesh.gateway.body_parsers.json_members import read_members, rewrite_body
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import HeaderPairs, Response, json_response
from gpumesh.gateway.http.streaming_response import StreamingResponse
from gpumesh.gateway.model_requests import ClientApi, read_node, read_timeout
from gpumesh.gateway.proxy import build_call
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.models.fleet_store import FleetStore, OperationResult, StoreOperation, is_done_where_possible
from gpumesh.mesh.models.model_store import OPERATION_TIMEOUT_S, json_call
from gpumesh.mesh.models.store_answers import SUCCESS, NodeResult, StoreStep

# Bytes, by safe_json.estimate_memory. A Modelfile with all its messages and licences needs far less.
MAX_DOCUMENT_MEMORY = 32 << 20
NDJSON = "application/x-ndjson"
_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")


class ModelStoreRoutes:
    """The handlers, one for each route. They raise BadRequest for a request that cannot be read, and the errors of
    ``FleetStore`` if no node can do what the client asks for."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._store = FleetStore(mesh)

    def _read_node(self, request: Request) -> str | None:
        """The node that the client names; ``None`` if the client names no node. Raises BadRequest if there is no such
        node."""
        return read_node(request.headers, self._mesh.topology)

    # -- operations with progress --------------------------------------------------------------------------------

    async def pull(self, request: Request) -> Response | StreamingResponse:
        """Downloads a model to the nodes, and streams the progress."""
        node = self._read_node(request)
        document, _ = await _read_document(request)
        _require_model(document, "model", "name")
        call, timeout_s = _streamed_call(request, document), _read_timeout(request)
        operation = self._store.start_pull(call, node, timeout_s=timeout_s)
        return await _stream_operation(request, document, operation, "pulled")

    async def push(self, request: Request) -> Response | StreamingResponse:
        """Uploads a model from a node that has it, and streams the progress."""
        node = self._read_node(request)
        document, _ = await _read_document(request)
        model = _require_model(document, "model", "name")
        call, timeout_s = _streamed_call(request, document), _read_timeout(request)
        operation = self._store.start_push(call, model, node, timeout_s=timeout_s)
        return await _stream_operation(request, document, operation, "pushed")

    async def create(self, request: Request) -> Response | StreamingResponse:
        """Makes a model on the nodes that have its parts, and streams the progress. The parts are the blobs of
        ``files`` and ``adapters``, or the model that ``from`` names."""
        node = self._read_node(request)
        document, _ = await _read_document(request)
        _require_model(document, "model", "name")
        usable_nodes = self._store.usable_nodes(node)
        digests = {*_read_digests(document.get("files")), *_read_digests(document.get("adapters"))}
        base_model = safe_json.as_text(document.get("from"))
        nodes = await self._store.nodes_for_create(usable_nodes, digests, base_model)
        call, timeout_s = _streamed_call(request, document), _read_timeout(request)
        operation = self._store.start_create(call, nodes, timeout_s=timeout_s)
        return await _stream_operation(request, document, operation, "created")

    # -- copy and delete -----------------------------------------------------------------------------------------

    async def copy(self, request: Request) -> Response:
        """Copies a model to a second name, on every node that has the model."""
        node = self._read_node(request)
        document, body = await _read_document(request)
        source = _require_model(document, "source")
        call, timeout_s = build_call(request, body), _read_timeout(request)
        results = await self._store.copy(call, source, node, timeout_s=timeout_s)
        return _render_results(results, "copied")

    async def delete(self, request: Request) -> Response:
        """Deletes a model from every node that has it."""
        node = self._read_node(request)
        document, body = await _read_document(request)
        model = _require_model(document, "model", "name")
        call, timeout_s = build_call(request, body), _read_timeout(request)
        results = await self._store.delete(call, model, node, timeout_s=timeout_s)
        return _render_results(results, "deleted")

    # -- blobs ---------------------------------------------------------------------------------------------------

    async def has_blob(self, request: Request) -> Response:
        """Answers 404 if a node lacks the blob, so that the client sends it, else 200. Ignores nodes that give no
        usable answer, and raises BackendError if no node gives one."""
        nodes = self._store.usable_nodes(self._read_node(request))
        holders = await self._store.find_blob(nodes, _read_blob_digest(request))
        if not holders.having and not holders.lacking:  # so all nodes are unsure
            first_result = holders.unsure[0]
            raise BackendError(first_result.error_text, node=first_result.node)
        return Response(status=404 if holders.lacking else 200, headers=node_header(holders.having))

    async def add_blob(self, request: Request) -> Response:
        """Answers 201 if all nodes have the blob now, 200 if they had it before, else an error."""
        nodes = self._store.usable_nodes(self._read_node(request))
        digest = _read_blob_digest(request)
        holders = await self._store.find_blob(nodes, digest)
        if not holders.lacking and not holders.unsure:  # so all nodes have it
            return Response(status=200, headers=node_header(nodes))
        results: list[NodeResult] = []
        if holders.lacking:
            pieces, timeout_s = request.read_body_pieces(), _read_timeout(request)
            results = await self._store.add_blob(holders.lacking, digest, pieces, timeout_s=timeout_s)
        results += holders.unsure  # such a node may lack the blob, so it counts as a failure
        if all(result.done for result in results):
            return Response(status=201, headers=node_header(nodes))
        return render_failures(results, "stored")


# -- reading requests ------------------------------------------------------------------------------------------------


def _read_timeout(request: Request) -> float:
    """The time-out of an operation, in seconds. Raises BadRequest for a client's time-out that is out of range."""
    return read_timeout(request.headers, OPERATION_TIMEOUT_S)


def _read_blob_digest(request: Request) -> str:
    """The digest in the request's path. Raises BadRequest if it does not have the form of a digest."""
    digest = request.path.removeprefix("/api/blobs/")
    if not _DIGEST.fullmatch(digest):
        raise BadRequest("invalid digest format")
    return digest


async def _read_document(request: Request) -> tuple[dict[str, Any], bytes]:
    """Returns the body as a document, then as bytes for the nodes. Both have the members' names in Ollama's own
    spelling. Raises BadRequest if the body is no JSON object, or too large, and QueueFull if there is no memory for the
    document."""
    body = await request.read_body()
    members = await read_members(body, request)
    if not members.has_common_spelling:
        body = await rewrite_body(body, members, request)
    memory = safe_json.estimate_memory(body, MAX_DOCUMENT_MEMORY)
    if memory is None:
        raise BadRequest("the request body is too large", status=413)
    request.reserve_memory(memory)
    document = safe_json.parse_object(body)
    if document is None:
        raise BadRequest("the request body is not JSON")
    return document, body


def _require_model(document: Mapping[str, Any], *keys: str) -> str:
    """The model's name: the text of the first of these keys that has a text. Raises BadRequest if no key has one."""
    for key in keys:
        value = document.get(key)
        if isinstance(value, str) and value.strip():
            return value
    raise BadRequest(f"{keys[0]} is required")


def _read_digests(files: object) -> list[str]:
    """The digests of ``{"name": "sha256:…"}``; none if ``files`` is no object. Raises BadRequest for a digest of
    another form, because each digest becomes a part of a path."""
    digests = list(files.values()) if isinstance(files, dict) else []
    for digest in digests:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise BadRequest("invalid digest format")
    return digests


def _streamed_call(request: Request, document: Mapping[str, Any]) -> HttpCall:
    """The request to a node. It asks for a stream of progress even if the client does not want one: without progress,
    nobody would notice that a node hangs."""
    return json_call("POST", request.path, {**document, "stream": True})


# -- writing answers -------------------------------------------------------------------------------------------------


async def _stream_operation(
    request: Request, document: Mapping[str, Any], operation: StoreOperation, verb: str
) -> Response | StreamingResponse:
    """Runs the operation on all nodes and streams their merged progress. ``verb``: the operation in a message, as
    ``pulled``.

    The client gets a single document instead of a stream in two cases: it does not want a stream, or the operation
    fails before its first step.
    """
    wants_stream = document.get("stream") is not False
    stream: StreamingResponse | None = None
    async with aclosing(operation.steps()) as batches:
        async for steps in batches:
            if wants_stream:
                stream = stream or _start_stream(request, operation)
                stream.write(b"".join(safe_json.dump_compact(_step_document(step)) + b"\n" for step in steps))
                await stream.drain()
    result = operation.result
    if stream is None and (result.failures or not wants_stream):  # the two cases of a single document
        return _single_document(result, verb)
    stream = stream or _start_stream(request, operation)
    stream.reported_failure = bool(result.failures)
    _, last_document = _last_document(result, verb)
    stream.write(safe_json.dump_compact(last_document) + b"\n")
    stream.finish()
    return stream


def _single_document(result: OperationResult, verb: str) -> Response:
    """The result of an operation as one document, for a client that gets no stream."""
    headers = node_header(result.nodes)
    refusal = result.refusal
    # The operation failed on all nodes for one reason, which a server gave with an HTTP status: the client gets this
    # status, where ``_last_document`` has 500. (By its type a refusal may have no status; ``result.refusal`` has one.)
    if result.common_failure is not None and refusal is not None and refusal.status is not None:
        body = error_shapes.error_body(ClientApi.OLLAMA, refusal.status, refusal.message)
        return json_response(body, status=refusal.status, headers=headers)
    status, document = _last_document(result, verb)
    return json_response(safe_json.dump_compact(document), status=status, headers=headers)


def _start_stream(request: Request, operation: StoreOperation) -> StreamingResponse:
    return request.start_stream((("Content-Type", NDJSON), *node_header(operation.nodes)))


def _step_document(step: StoreStep) -> dict[str, object]:
    """A step of progress as Ollama writes it. Only the step of a layer has a digest and sizes, in bytes."""
    if step.digest is None:
        return {"status": step.status}
    return {
        "status": step.status,
        "digest": step.digest,
        "total": step.total_bytes,
        "completed": step.completed_bytes,
    }


def _last_document(result: OperationResult, verb: str) -> tuple[int, dict[str, str]]:
    """Returns the HTTP status for a client that gets no stream, then the last document of the operation's progress."""
    if not result.failures:
        return 200, {"status": SUCCESS}
    if result.common_failure is not None:  # on all nodes, for one reason
        return 500, {"error": result.common_failure}
    # On some nodes only, or for several reasons.
    return 502, {"error": _describe_partial_success(verb, result.done, result.failures)}


def _render_results(results: Sequence[NodeResult], verb: str) -> Response:
    """Answers a ``copy`` or ``delete`` with success if it succeeded on every node that has the model, else with an
    error."""
    if not is_done_where_possible(results):
        return render_failures(results, verb)
    successes = [result for result in results if result.done]
    # Without a body, and with a server's own status, as Ollama answers.
    return Response(status=_http_status(successes[0]), headers=node_header([result.node for result in successes]))


def render_failures(results: Sequence[NodeResult], verb: str) -> Response:
    """Answers with the servers' own error if all nodes gave the same, else with 502 and one message: the nodes where
    the operation succeeded, and the reasons of the others. ``results``: at least one of them is a failure."""
    different_errors = {(_http_status(result), result.error_text) for result in results}
    if len(different_errors) == 1:
        [(status, message)] = different_errors
    else:
        status = 502
        successful_nodes = [result.node for result in results if result.done]
        failures = {result.node: result.error_text for result in results if not result.done}
        message = _describe_partial_success(verb, successful_nodes, failures)
    headers = node_header([result.node for result in results])
    return json_response(error_shapes.error_body(ClientApi.OLLAMA, status, message), status=status, headers=headers)


def _http_status(result: NodeResult) -> int:
    """The status that the node's server sent; if it sent none, the gateway's status for the error."""
    if result.status is not None:
        return result.status
    return 500 if result.error is None else error_shapes.error_status(result.error)


def _describe_partial_success(verb: str, successful_nodes: Sequence[str], failures: Mapping[str, str]) -> str:
    """The error message of an operation that failed on some nodes. ``failures``: the reasons by node."""
    reasons = "; ".join(f"{node}: {reason}" for node, reason in failures.items())
    return f"{verb} on {', '.join(successful_nodes) or 'no node'}; not on {reasons}"


def node_header(nodes: Iterable[str]) -> HeaderPairs:
    return (("X-GPUMesh-Node", ", ".join(nodes)),)
