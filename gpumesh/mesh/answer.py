"""One attempt on one node, and the answer that came of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from gpumesh.backends.base import Counters, HttpCall
from gpumesh.backends.dialects import counters_of
from gpumesh.balancer.outcomes import Outcome, judge, of_status
from gpumesh.errors import BackendStatus, BackendUnreachable, DeadlineExceeded, GPUMeshError, StreamCut
from gpumesh.mesh.node import Lease
from gpumesh.mesh.upstream import Upstream, UpstreamResponse
from gpumesh.mesh.watch import StreamWatch, error_frame, generates
from gpumesh.topology import BackendKind

STREAMING = frozenset({"application/x-ndjson", "text/event-stream"})
# A whole answer is held back until it is complete, so that one cut short can be asked of another node.
HELD_BYTES = 32 << 20
ERROR_BYTES = 1 << 20
Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt that another node may make good. ``answer`` is the server's own error, if it gave one."""

    node: str
    outcome: Outcome
    error: GPUMeshError
    answer: Answer | None = None


class Ended(Protocol):
    """Told once how a request ended, for the books of the whole mesh."""

    def __call__(self, outcome: Outcome) -> None: ...


class Answer:
    """An answer's head, and its body as an async iterator of bytes. Iterate to the end or ``aclose``.

    ``attempts`` counts the nodes that were tried, ``queue_ms`` the time spent waiting for a place. ``outcome`` is how a
    streaming answer ended, once it has; ``continuations`` how often another node went on with it; ``counters`` the
    server's own figures, if it gave any.
    """

    def __init__(self, node: str, kind: BackendKind, status: int, headers: Headers) -> None:
        self.node = node
        self.kind = kind
        self.status = status
        self.headers = headers
        self.attempts = 1
        self.queue_ms = 0.0
        self.on_end: Ended | None = None
        self.outcome: Outcome | None = None
        self.continuations = 0

    @property
    def counters(self) -> Counters | None:
        return None

    @property
    def body(self) -> bytes | None:
        """The whole body where it is known already; ``None`` while it streams."""
        return None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        raise NotImplementedError

    async def aclose(self) -> None:
        """Ends the request, whatever is left of it. Harmless when it has ended."""

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self])

    def _ended(self, outcome: Outcome) -> None:
        self.outcome = outcome
        if self.on_end is not None:
            told, self.on_end = self.on_end, None
            told(outcome)


class WholeAnswer(Answer):
    """One that is complete before anybody sees it."""

    def __init__(
        self,
        node: str,
        kind: BackendKind,
        status: int,
        headers: Headers,
        body: bytes,
        counters: Counters | None = None,
    ) -> None:
        super().__init__(node, kind, status, headers)
        self._body = body
        self._counters = counters
        self._given = False

    @property
    def counters(self) -> Counters | None:
        return self._counters

    @property
    def body(self) -> bytes:
        return self._body

    async def __anext__(self) -> bytes:
        if self._given or not self._body:
            raise StopAsyncIteration
        self._given = True
        return self._body


class StreamingAnswer(Answer):
    """One that is passed on as it comes. Its place on the node is free as soon as its final frame was seen."""

    def __init__(
        self,
        lease: Lease,
        response: UpstreamResponse,
        watch: StreamWatch,
        first: bytes,
        *,
        deadline_in_s: float,
    ) -> None:
        super().__init__(lease.node.name, lease.node.kind, response.status, response.headers)
        self._lease = lease
        self._response = response
        self._watch = watch
        self._first = first
        self._over = False
        self._late = False
        lease.abort = response.abort
        self._timer = asyncio.get_running_loop().call_later(deadline_in_s, self._deadline_passed)
        self._saw(first)

    @property
    def counters(self) -> Counters | None:
        return self._watch.counters

    async def __anext__(self) -> bytes:
        if self._first:
            first, self._first = self._first, b""
            return first
        if self._over:
            raise StopAsyncIteration
        try:
            data = await self._response.read()
        except StreamCut as error:
            if self._watch.done:
                self._finish(Outcome.SERVED)
                raise StopAsyncIteration from None
            if self._late:
                self._finish(Outcome.DEADLINE)
                raise DeadlineExceeded("the deadline passed while the answer was on its way", node=self.node) from None
            self._finish(Outcome.CUT, str(error))
            raise
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if data:
            self._saw(data)
            return data
        self._watch.close()
        if not self._watch.done:
            words = "the answer ended before its final frame"
            self._finish(Outcome.CUT, words)
            raise StreamCut(words, node=self.node)
        self._finish(Outcome.SERVED)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        if not self._over:
            self._response.abort()
            self._finish(Outcome.SERVED if self._watch.done and not self._first else Outcome.CLIENT_GONE)

    def _saw(self, data: bytes) -> None:
        frames = self._watch.feed(data)
        if frames:
            self._lease.node.meter.add(frames)
        if self._watch.done and self._watch.counters is not None:
            self._lease.release(Outcome.SERVED, counters=self._watch.counters)

    def _finish(self, outcome: Outcome, error: str | None = None) -> None:
        self._over = True
        self._timer.cancel()
        self._lease.release(outcome, counters=self._watch.counters, error=error)
        self._ended(outcome)

    def _deadline_passed(self) -> None:
        self._late = True
        self._response.abort()


async def attempt(
    upstream: Upstream, lease: Lease, call: HttpCall, *, timeout_s: float, monotonic: Callable[[], float]
) -> Answer | Failed:
    """One try on the leased node, up to the answer's first bytes.

    The lease is released here unless a StreamingAnswer took it over; also when this is cancelled.
    """
    node = lease.node
    loop = asyncio.get_running_loop()
    began = monotonic()
    response: UpstreamResponse | None = None
    try:
        async with asyncio.timeout(timeout_s) as scope:
            lease.abort = lambda: scope.reschedule(loop.time())
            response = await upstream.request(
                node.base_url, call, _headers(lease, call), node=node.name, server_name=_server_name(lease)
            )
            result = await _first_bytes(lease, response, call, deadline=began + timeout_s, monotonic=monotonic)
            lease.abort = response.abort
            return result
    except TimeoutError:
        if response is not None:
            response.abort()
        if lease.aborted:
            gone = BackendUnreachable("the way to it was lost", node=node.name)
            return _failed(lease, Outcome.UNREACHABLE, gone)
        return _failed(lease, Outcome.DEADLINE, DeadlineExceeded(f"no answer within {timeout_s:.0f} s", node=node.name))
    except BackendUnreachable as error:
        return _failed(lease, Outcome.UNREACHABLE, error)
    except StreamCut as error:
        return _failed(lease, Outcome.CUT, error)
    except BaseException:
        # Cancelled: the client left. The connection is closed so that the server stops too.
        if response is not None:
            response.abort()
        lease.release(Outcome.CLIENT_GONE)
        raise


def _failed(lease: Lease, outcome: Outcome, error: GPUMeshError, answer: Answer | None = None) -> Failed:
    lease.release(outcome, error=str(error))
    return Failed(lease.node.name, outcome, error, answer)


async def _first_bytes(
    lease: Lease, response: UpstreamResponse, call: HttpCall, *, deadline: float, monotonic: Callable[[], float]
) -> Answer | Failed:
    node = lease.node
    outcome = of_status(response.status, model_asked=lease.model is not None)
    if outcome is not Outcome.SERVED:
        body = await _whole(response, ERROR_BYTES)
        answer = WholeAnswer(node.name, node.kind, response.status, response.headers, body or b"")
        if judge(outcome).move_on:
            error = BackendStatus(f"it answered {response.status}", status=response.status, body=body or b"")
            return _failed(lease, outcome, error, answer)
        lease.release(outcome)
        return answer
    if response.content_type not in STREAMING and (response.content_length or 0) <= HELD_BYTES:
        body = await _whole(response, HELD_BYTES)
        if body is None:
            return _failed(lease, Outcome.CUT, StreamCut("the answer is larger than can be held", node=node.name))
        counters = counters_of(body) if generates(call.path) else None
        if counters is not None and counters.tokens:
            node.meter.add(counters.tokens)
        lease.release(Outcome.SERVED, counters=counters)
        return WholeAnswer(node.name, node.kind, response.status, response.headers, body, counters)
    first = await response.read()
    watch = StreamWatch(call.path)
    if not first and not watch.done:
        return _failed(lease, Outcome.CUT, StreamCut("the answer ended before its first frame", node=node.name))
    if error_frame(first):
        response.abort()
        answer = WholeAnswer(node.name, node.kind, 500, response.headers, first)
        error = BackendStatus("it answered with an error", status=500, body=first, node=node.name)
        return _failed(lease, Outcome.SERVER_ERROR, error, answer)
    return StreamingAnswer(lease, response, watch, first, deadline_in_s=max(deadline - monotonic(), 0.0))


async def _whole(response: UpstreamResponse, limit: int) -> bytes | None:
    """The body to its end; ``None`` when it is longer than ``limit``, and then the rest is not read."""
    pieces: list[bytes] = []
    size = 0
    while data := await response.read():
        size += len(data)
        if size > limit:
            response.abort()
            return None
        pieces.append(data)
    return b"".join(pieces)


def _headers(lease: Lease, call: HttpCall) -> list[tuple[str, str]]:
    target = lease.node.target
    headers = [*call.headers]
    if target is not None:
        headers.append(("Host", f"{target.host}:{target.port}"))
    key = lease.node.api_key()
    if key is not None:
        headers = [pair for pair in headers if pair[0].lower() not in ("authorization", "x-api-key")]
        headers.append(("Authorization", f"Bearer {key}"))
    return headers


def _server_name(lease: Lease) -> str | None:
    """For TLS through a tunnel: the certificate names the host's own name, not our end of the tunnel."""
    target = lease.node.target
    return target.host if target is not None and target.scheme == "https" else None
