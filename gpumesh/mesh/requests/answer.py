"""The answer to a request, as the code that sent the request gets it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

from gpumesh.backends import safe_json
from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.outcomes import Outcome
from gpumesh.mesh.requests.body_sink import ByteSink
from gpumesh.topology import BackendKind

HeaderPairs = tuple[tuple[str, str], ...]
OutcomeListener = Callable[[Outcome], None]
"""Called once, with how a request ended, for the counters of the whole mesh."""


class ClientStream(ByteSink, Protocol):
    """A client's stream, which an answer is pushed into."""

    async def drain(self, is_wanted: Callable[[], bool]) -> None:
        """Waits while the stream is ``backpressured``. ``is_wanted`` says whether other requests wait for what this
        answer holds: then a client that takes nothing is an error. Raises ConnectionError when the client is gone."""


class Answer:
    """An answer's head, and its body: iterate it to the end, push it to a client's stream with ``send_to``, or
    ``aclose`` the answer.

    ``attempts`` counts the nodes that were tried, ``queue_ms`` is the time spent waiting for a slot. ``outcome`` is how
    the answer ended, once it has; a whole answer has one from the start. ``continuations`` is how often another node
    went on with it (``node`` is then the last one); ``counters`` are the server's own figures, if it gave any.
    ``error_message``: the body is an error of ours with this text, which the gateway writes in its client's dialect.
    """

    __slots__ = (
        "attempts",
        "continuations",
        "error_message",
        "headers",
        "kind",
        "node",
        "on_outcome",
        "outcome",
        "queue_ms",
        "status",
    )

    def __init__(self, node: str, kind: BackendKind, status: int, headers: HeaderPairs) -> None:
        self.node = node
        self.kind = kind
        self.status = status
        self.headers = headers
        self.attempts = 1
        self.queue_ms = 0.0
        self.on_outcome: OutcomeListener | None = None
        self.outcome: Outcome | None = None
        self.continuations = 0
        self.error_message: str | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.node} {self.status}>"

    @property
    def counters(self) -> ServerCounters | None:
        return None

    @property
    def body(self) -> bytes | None:
        """The whole body where it is known already; ``None`` while it streams."""
        return None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        raise NotImplementedError

    async def send_to(self, client: ClientStream) -> None:
        """Pushes the body to a client's stream, to its end. Raises GPUMeshError when the answer is cut, and
        ConnectionError when the client is gone."""
        raise NotImplementedError

    def expire(self, message: str) -> None:
        """The answer's deadline is now: its reader gets DeadlineExceeded with this message. Harmless after its end."""

    def slot_is_wanted(self) -> bool:
        """Whether other requests wait for the slot on a node that this answer holds."""
        return False

    async def aclose(self) -> None:
        """Ends the request, whatever is left of it. Harmless after its end."""

    def error_frame(self, message: str) -> bytes | None:  # noqa: ARG002
        """An explicit error as a frame of this answer's own stream; ``None`` where it has none."""
        return None

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self])

    async def read_at_most(self, limit: int) -> bytes | None:
        """The whole body; ``None`` when it is longer, and then the request is ended: a node may send without an end."""
        pieces: list[bytes] = []
        size = 0
        try:
            async for piece in self:
                size += len(piece)
                if size > limit:
                    return None
                pieces.append(piece)
            return b"".join(pieces)
        finally:
            await self.aclose()

    def _report_outcome(self, outcome: Outcome) -> None:
        self.outcome = outcome
        if self.on_outcome is not None:
            listener, self.on_outcome = self.on_outcome, None
            listener(outcome)


class WholeAnswer(Answer):
    """An answer that is complete before anybody sees it."""

    __slots__ = ("_body", "_body_was_read", "_counters")

    def __init__(
        self,
        node: str,
        kind: BackendKind,
        status: int,
        headers: HeaderPairs,
        body: bytes,
        counters: ServerCounters | None = None,
    ) -> None:
        super().__init__(node, kind, status, headers)
        self._body = body
        self._counters = counters
        self._body_was_read = False
        self.outcome = Outcome.SERVED if status < 500 else Outcome.SERVER_ERROR

    @property
    def counters(self) -> ServerCounters | None:
        return self._counters

    @property
    def body(self) -> bytes:
        return self._body

    async def __anext__(self) -> bytes:
        if self._body_was_read or not self._body:
            raise StopAsyncIteration
        self._body_was_read = True
        return self._body

    async def send_to(self, client: ClientStream) -> None:
        async for body in self:
            client.write(body)


def error_answer(node: str, kind: BackendKind, status: int, headers: HeaderPairs, problem: str) -> WholeAnswer:
    """Takes the place of a server's answer that nobody may see. ``headers`` hold no Content-Type. ``problem`` is a
    sentence whose subject, "it", is the server."""
    message = f"{node}: {problem}"
    body = safe_json.dump_compact({"error": message})
    answer = WholeAnswer(node, kind, status, (("Content-Type", "application/json"), *headers), body)
    answer.error_message = message
    return answer
