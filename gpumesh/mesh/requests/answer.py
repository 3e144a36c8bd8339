"""``Answer``: the answer to a request, as the sender of the request gets it, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec

from gpumesh.backends import safe_json
from gpumesh.backends.base import ServerCounters
from gpumesh.backends.continuation.continuation import Continuation
from gpumesh.balancer.outcomes import Outcome
from gpumesh.balancer.scheduling.scheduler import Placement
from gpumesh.mesh.requests.body_sink import ByteSink
from gpumesh.topology import BackendKind

HeaderPairs = tuple[tuple[str, str], ...]
OutcomeListener = Callable[[Outcome], None]
"""A function that gets the outcome of each request, once: for the counters of the whole mesh."""


class SendProgress(msgspec.Struct, eq=False):
    """How far the sending of a request has come. So it is also known of a request that gets no answer.

    ``node`` got the request last; ``None``: no node has got it. ``attempts`` counts the requests to nodes. ``queue_s``
    is the time in seconds that the request has waited for slots. ``placement`` is that of the last attempt, and
    ``earlier_placements`` are those of the attempts before it; only attempts that took a slot have one.
    """

    node: str | None = None
    attempts: int = 0
    queue_s: float = 0.0
    placement: Placement | None = None
    earlier_placements: tuple[Placement, ...] = ()


class ClientStream(ByteSink, Protocol):
    """A client's stream, into which an answer is pushed."""

    async def drain(self, slot_is_wanted: Callable[[], bool]) -> None:
        """Waits while the stream is ``backpressured``. Raises ConnectionError when the client is gone.

        ``slot_is_wanted`` returns whether other requests wait for the slot of this answer. If they do, it is also an
        error when the client takes no bytes for some seconds.
        """


class Answer:
    """An answer's head and body. The holder must do one of three things: iterate the body to its end, push it to a
    client's stream with ``send_to``, or ``aclose`` the answer.

    ``attempts`` counts the requests to nodes, ``queue_ms`` is the time that the request waited for slots. ``outcome``
    is ``None`` until the answer has ended; a whole answer has its outcome from the start. ``continuations`` counts how
    often another node continued the answer; ``node`` is the last node. ``model`` is the name of the model that answers;
    ``None`` if the client asked for this name. ``placement`` is the balancer's decision for the node where the answer
    began; ``None`` if the request needed no slot. ``why`` explains this decision; ``None`` if the client has not asked
    for it. ``error_message``: the body is an error that the mesh made from this text, and the gateway writes the text
    in the client's dialect; ``None`` for any other body. ``consists_of_frames``: the client's stream gets whole frames
    only, so that the holder may write something of its own between them.
    """

    __slots__ = (
        "_continuation",
        "attempts",
        "consists_of_frames",
        "continuations",
        "error_message",
        "headers",
        "kind",
        "model",
        "node",
        "on_outcome",
        "outcome",
        "placement",
        "queue_ms",
        "status",
        "why",
    )

    def __init__(self, node: str, kind: BackendKind, status: int, headers: HeaderPairs) -> None:
        self.node = node
        self.kind = kind
        self.status = status
        self.headers = headers
        self.model: str | None = None
        self.placement: Placement | None = None
        self.why: str | None = None
        self.attempts = 1
        self.queue_ms = 0.0
        self._continuation: Continuation | None = None  # what the client has got of a stream of generated text
        self.on_outcome: OutcomeListener | None = None  # called once, with the outcome
        self.outcome: Outcome | None = None
        self.continuations = 0
        self.error_message: str | None = None
        self.consists_of_frames = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.node} {self.status}>"

    @property
    def counters(self) -> ServerCounters | None:
        """The server's own figures for this answer; ``None`` if the server has given none."""
        return None if self._continuation is None else self._continuation.answer_counters

    @property
    def streamed_tokens(self) -> int:
        """About how many tokens the client has got of a stream, by its frames; 0 if it has no frames of text."""
        return 0 if self._continuation is None else self._continuation.tokens

    @property
    def body(self) -> bytes | None:
        """The body if it is complete; ``None`` for an answer that streams."""
        return None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """The next bytes of the body. Raises GPUMeshError when the answer is cut."""
        raise NotImplementedError

    async def send_to(self, client: ClientStream) -> None:
        """Pushes the whole body to a client's stream. Raises GPUMeshError when the answer is cut, and ConnectionError
        when the client is gone."""
        raise NotImplementedError

    def expire(self, message: str) -> None:
        """Sets the answer's deadline to now: its reader gets DeadlineExceeded with this message. Does nothing after the
        answer's end."""

    def slot_is_wanted(self) -> bool:
        """Whether other requests wait for the slot that this answer holds on its node. An answer without a slot says
        no."""
        return False

    async def aclose(self) -> None:
        """Ends the request, also in the middle of its body. Does nothing after the answer's end."""

    def error_frame(self, message: str) -> bytes | None:
        """An error message as a frame of this answer's stream; ``None`` if the stream has no frames."""
        return None if self._continuation is None else self._continuation.error_frame(message)

    async def read(self) -> bytes:
        """Reads the whole body, of any length. Raises GPUMeshError when the answer is cut."""
        return b"".join([piece async for piece in self])

    async def read_at_most(self, limit: int) -> bytes | None:
        """Reads the whole body; returns ``None`` if it is longer than ``limit`` bytes. Ends the request in both cases:
        a node could send without end."""
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
        """Sets the outcome. Passes the first outcome to ``on_outcome``, and drops the listener."""
        self.outcome = outcome
        if self.on_outcome is not None:
            listener, self.on_outcome = self.on_outcome, None
            listener(outcome)


class WholeAnswer(Answer):
    """An answer whose whole body is known before the first byte goes to the client. Its methods: see ``Answer``."""

    __slots__ = ("_body_was_read", "body", "counters")

    body: bytes
    counters: ServerCounters | None

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
        self.body = body
        self.counters = counters
        self._body_was_read = False
        # A 4xx is the client's own mistake, so the server has served the request.
        self.outcome = Outcome.SERVED if status < 500 else Outcome.SERVER_ERROR

    async def __anext__(self) -> bytes:
        if self._body_was_read or not self.body:
            raise StopAsyncIteration
        self._body_was_read = True
        return self.body

    async def send_to(self, client: ClientStream) -> None:
        async for body in self:
            client.write(body)


def error_answer(node: str, kind: BackendKind, status: int, headers: HeaderPairs, problem: str) -> WholeAnswer:
    """Makes the error that a client gets instead of a server's answer that no client may get. ``headers`` hold no
    Content-Type. ``problem`` is a sentence whose subject, "it", is the server."""
    message = f"{node}: {problem}"
    body = safe_json.dump_compact({"error": message})
    answer = WholeAnswer(node, kind, status, (("Content-Type", "application/json"), *headers), body)
    answer.error_message = message
    return answer
