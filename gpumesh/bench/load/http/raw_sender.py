"""Sends requests over HTTP to the gateway, to nodes, or to any server, and keeps each answer as it arrives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpumesh.backends.base import ChatRequest, HttpCall
from gpumesh.bench.load.http.client_apis import API_FUNCTIONS, ClientApi
from gpumesh.bench.load.http.raw_answers import ArrivalSink, RawAnswer
from gpumesh.errors import BackendStatus, BackendUnreachable, GPUMeshError
from gpumesh.mesh.requests.connections.connection_pool import CONNECT_TIMEOUT_S, ConnectionPool
from gpumesh.mesh.requests.connections.response_parser import ResponseHead
from gpumesh.mesh.requests.connections.upstream_connection import exception_text
from gpumesh.mesh.requests.upstream import parse_base_url, render_head
from gpumesh.text.printable import printable

MAX_ATTEMPTS_DIGITS = 4  # a longer number of attempts is not believed
MAX_NODE_NAME = 200


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A place to which the load generator sends, and the API in which it asks there.

    ``node`` is the only node that answers there; ``None``: the mesh chooses. ``through_gateway``: a header tells the
    gateway which node is to answer.
    """

    url: str
    api: ClientApi
    node: str | None = None
    through_gateway: bool = False
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ReadyRequest:
    """A request that only has to be sent: its calls are rendered, by API. ``node`` and ``at_s``: as in
    ``PlannedRequest``."""

    calls: Mapping[ClientApi, HttpCall]
    node: str | None
    at_s: float | None


@dataclass(slots=True)
class _Target:
    """An endpoint with what is known of it while a stage runs."""

    endpoint: Endpoint
    headers: tuple[tuple[str, str], ...]
    in_flight: int = 0
    sent: int = 0


class RawSender:
    """Sends the requests of a stage to ``endpoints``, over the connections of ``pool``.

    ``timeout_s`` limits a whole request, with its answer.
    """

    def __init__(self, pool: ConnectionPool, endpoints: Sequence[Endpoint], *, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._targets = [_Target(endpoint, _fixed_headers(endpoint)) for endpoint in endpoints]
        self.in_flight: dict[int, RawAnswer] = {}
        """The answers that have not ended, by the request's index. A request that is cancelled stays here."""

    def __repr__(self) -> str:
        return f"<RawSender {len(self._targets)} endpoints>"

    def prepare(self, chat: ChatRequest, node: str | None, at_s: float | None) -> ReadyRequest:
        """Renders a request for each API of the endpoints that may get it."""
        apis = {target.endpoint.api for target in self._targets_for(node)}
        return ReadyRequest({api: API_FUNCTIONS[api].build_call(chat) for api in apis}, node, at_s)

    async def send(self, request: ReadyRequest, index: int, intended_s: float | None) -> RawAnswer:
        """Sends a request, and returns what came of it when the answer has ended. Raises no GPUMeshError.

        ``intended_s``: when an open loop should have sent it, on ``time.perf_counter``.
        """
        # Of equally busy targets the one that was used least; with a single target there is no choice.
        target = min(self._targets_for(request.node), key=lambda target: (target.in_flight, target.sent))
        endpoint = target.endpoint
        sent_s = time.perf_counter()
        answer = RawAnswer(index, sent_s if intended_s is None else intended_s, sent_s, endpoint.api, endpoint.node)
        target.in_flight += 1
        target.sent += 1
        self.in_flight[index] = answer
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(target, request.calls[endpoint.api], answer)
        except TimeoutError:
            answer.error = BackendUnreachable(f"no answer within {self._timeout_s:g} s", node=answer.node)
        except GPUMeshError as error:
            answer.error = error
        finally:
            target.in_flight -= 1
        ended_s = None if answer.sink is None else answer.sink.ended_s
        answer.ended_s = time.perf_counter() if ended_s is None else ended_s
        del self.in_flight[index]
        return answer

    def _targets_for(self, node: str | None) -> list[_Target]:
        """The targets of requests to this node. For any node: where the mesh chooses, else all targets."""
        matching = [target for target in self._targets if target.endpoint.node == node]
        return matching or self._targets

    async def _exchange(self, target: _Target, call: HttpCall, answer: RawAnswer) -> None:
        """Sends the call, and reads its answer to the end. Raises BackendUnreachable, and BackendStatus for another
        status than 200."""
        endpoint = target.endpoint
        address, prefix, host = parse_base_url(endpoint.url, None)
        head_bytes = render_head(call, prefix, call.headers + target.headers, host)
        connection = self._pool.take_idle(address)
        while True:
            was_kept_alive = connection is not None
            if connection is None:
                try:
                    connection = await self._pool.connect(address)
                except TimeoutError:
                    raise BackendUnreachable(
                        f"no connection within {CONNECT_TIMEOUT_S:g} s", node=answer.node
                    ) from None
                except OSError as error:
                    raise BackendUnreachable(f"no connection: {exception_text(error)}", node=answer.node) from error
            exchange = connection.start_exchange(call.method, head_bytes, call.body)
            sink = ArrivalSink(asyncio.get_running_loop().create_future())
            connection.push_to(sink)  # before the first byte, so that the sink notes the time of each read
            try:
                await self._read(exchange.head, sink, answer)
            except ConnectionResetError as error:
                # A server may close an idle connection at any time: then the request goes over a new one.
                if was_kept_alive and not exchange.answered:
                    connection = None
                    continue
                raise BackendUnreachable(f"no answer: {error}", node=answer.node) from None
            finally:
                if exchange.connection is not None:  # the exchange has not ended: a time-out, or too long an answer
                    exchange.connection.abort()
            return

    async def _read(self, head: asyncio.Future[ResponseHead], sink: ArrivalSink, answer: RawAnswer) -> None:
        """Waits for the head and the end of an answer. Raises ConnectionResetError if no head comes, and BackendStatus
        for another status than 200."""
        response_head = await head
        _note_fate(response_head, answer)
        if response_head.status == 200:
            answer.sink = sink  # also if the rest of the answer never comes
        await sink.end
        if response_head.status != 200:
            body = bytes(sink.data)
            message = API_FUNCTIONS[answer.api].error_text(response_head.status, body)
            raise BackendStatus(message, status=response_head.status, node=answer.node)


def _fixed_headers(endpoint: Endpoint) -> tuple[tuple[str, str], ...]:
    """The headers of each request to this endpoint: the node for the gateway, and the API key."""
    headers = API_FUNCTIONS[endpoint.api].key_headers(endpoint.api_key)
    if endpoint.through_gateway and endpoint.node is not None:
        headers = (*headers, ("X-GPUMesh-Node", endpoint.node))
    return headers


def _note_fate(head: ResponseHead, answer: RawAnswer) -> None:
    """Notes which node has answered after how many attempts, if the gateway says it in the head of its response."""
    answer.attempts = 1
    for name, value in head.fields:
        match name.lower():
            case b"x-gpumesh-node":
                answer.node = printable(value, MAX_NODE_NAME) or answer.node
            case b"x-gpumesh-attempts" if value.isdigit() and len(value) <= MAX_ATTEMPTS_DIGITS:
                answer.attempts = int(value)
