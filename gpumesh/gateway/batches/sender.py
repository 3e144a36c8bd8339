"""``GatewaySender`` sends the requests of batches through the gateway of this process, as if their owner sent them.

So the models and nodes of the owner's key hold, its quotas too, and what it uses is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from gpumesh.balancer.base import Priority
from gpumesh.batches.values import COMMAND_LINE, PROMPT_ENDPOINT, BatchRequest, Reply
from gpumesh.errors import BatchOwnerUnknown, NoNodeError, StreamCut
from gpumesh.gateway import ended_requests
from gpumesh.gateway.access.api_keys import find_key_by_name
from gpumesh.gateway.batches.endpoints import ENDPOINT_RULE, is_batch_endpoint
from gpumesh.gateway.batches.owners import NO_KEY
from gpumesh.gateway.batches.prompt_sender import PromptSender
from gpumesh.gateway.error_shapes import client_message, error_body
from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.gateway.http.errors import BadRequest, TooManyRequests
from gpumesh.gateway.http.responses import HeaderPairs
from gpumesh.gateway.in_process import InProcessClient, InProcessReply
from gpumesh.gateway.model_requests import MAX_TIMEOUT_S, ClientApi
from gpumesh.gateway.usage.recorder import COMMAND_LINE as COMMAND_LINE_KEY
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.requests.answer import Answer

MIN_TIMEOUT_S = 0.001
STOPPED_STATUS = 503
MAX_RETRY_DIGITS = 6


class GatewaySender:
    """Implements ``batches.base.Sender``. ``on_prompt_end`` gets the answer to each prompt of a batch of prompts when
    it has ended."""

    def __init__(self, client: InProcessClient, mesh: Mesh, on_prompt_end: Callable[[Answer], None]) -> None:
        self._client = client
        self._mesh = mesh
        self._prompts = PromptSender(mesh, on_prompt_end)

    def __repr__(self) -> str:
        return f"<GatewaySender {self._client!r}>"

    async def send(self, request: BatchRequest) -> Reply:
        """See ``Sender.send``. What the gateway itself refuses for good (403, 413 …) is a reply, too."""
        if request.endpoint == PROMPT_ENDPOINT:
            return await self._prompts.send(request)
        key = self._find_owner_key(request.owner)
        if key is None and request.owner != NO_KEY:
            message = f"the key {request.owner}, with which this batch was made, is not in mesh.yaml"
            if self._mesh.topology.redis is not None:  # another gateway may have it
                raise BatchOwnerUnknown(message)
            return _refuse(401, f"{message} any more")
        if not is_batch_endpoint(request.endpoint):
            return _refuse(404, f"{request.endpoint[:100]} is no route of a batch: {ENDPOINT_RULE}")
        if _wants_stream(request.body):
            return _refuse(400, "a request of a batch cannot stream its answer: leave out `stream`")
        try:
            reply = await self._client.post(request.endpoint, _make_headers(request), request.body, key)
        except TooManyRequests:
            raise
        except BadRequest as error:
            return _refuse(error.status, client_message(error))
        except ConnectionError as error:
            raise StreamCut(str(error)) from error
        if reply.status == STOPPED_STATUS and "x-gpumesh-error" in reply.headers:
            raise NoNodeError(ended_requests.STOPPED_MESSAGE)
        return _read_reply(reply)

    def _find_owner_key(self, owner: str) -> ClientKey | None:
        """The key whose rights a request of this owner has; ``None``: it has none."""
        if owner == COMMAND_LINE:
            return COMMAND_LINE_KEY
        if owner == NO_KEY:
            return None
        return find_key_by_name(self._mesh.topology.gateway, owner, self._mesh.model_rules.identity)


def _refuse(status: int, message: str) -> Reply:
    """The reply to a request that was sent to no node."""
    return Reply(status, error_body(ClientApi.OPENAI, status, message), attempts=0)


class _StreamMember(msgspec.Struct, gc=False):
    """The member of a body that asks for a stream."""

    stream: Any = None


_decode_stream = msgspec.json.Decoder(_StreamMember).decode


def _wants_stream(body: bytes) -> bool:
    """Whether the body asks for a stream, which is no line of a file of results."""
    if b'"stream"' not in body:
        return False
    try:
        return _decode_stream(body).stream is True
    except (ValueError, RecursionError):  # the server will tell what is wrong with it
        return False


def _make_headers(request: BatchRequest) -> HeaderPairs:
    """The headers of a client that sends this request."""
    timeout_s = min(max(request.timeout_s, MIN_TIMEOUT_S), MAX_TIMEOUT_S)
    headers = [
        ("Content-Type", "application/json"),
        ("X-Request-Id", request.id),
        ("X-GPUMesh-Priority", Priority.BATCH.value),
        ("X-GPUMesh-Timeout", f"{timeout_s:.3f}"),
    ]
    if request.session:
        headers.append(("X-GPUMesh-Session", request.session))
    return tuple(headers)


def _read_reply(reply: InProcessReply) -> Reply:
    headers = reply.headers
    attempts = headers.get("x-gpumesh-attempts", "")
    return Reply(
        reply.status,
        reply.body,
        headers.get("x-gpumesh-node"),
        int(attempts) if attempts.isascii() and attempts.isdigit() else 1,
        _read_retry_after(headers.get("retry-after", "")),
    )


def _read_retry_after(value: str) -> float | None:
    """The seconds that a server asks to wait; ``None`` for anything but a number of them, such as a date."""
    return float(value) if value.isascii() and value.isdigit() and len(value) < MAX_RETRY_DIGITS else None
