"""The answer to a request, as who sent it gets it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from gpumesh.backends import safe_json
from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.outcomes import Outcome
from gpumesh.topology import BackendKind

HeaderPairs = tuple[tuple[str, str], ...]
OutcomeListener = Callable[[Outcome], None]
"""Told once how a request ended, for the books of the whole mesh."""


class Answer:
    """An answer's head, and its body as an async iterator of bytes. Iterate to the end or ``aclose``.

    ``attempts`` counts the nodes that were tried, ``queue_ms`` the time spent waiting for a slot. ``outcome`` is how
    the answer ended, once it has; a whole answer has one from the start. ``continuations`` is how often another node
    went on with it (``node`` is then the last one); ``counters`` the server's own figures, if it gave any.
    ``error_message``: the body is an error of ours with this text, which the gateway writes in its client's dialect.
    """

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

    def expire(self, words: str) -> None:
        """Its deadline is now: whoever iterates gets DeadlineExceeded with these words. Harmless when it has ended."""

    def slot_is_wanted(self) -> bool:
        """Whether other requests wait for the slot on a node that this one holds."""
        return False

    async def aclose(self) -> None:
        """Ends the request, whatever is left of it. Harmless when it has ended."""

    def error_frame(self, message: str) -> bytes | None:  # noqa: ARG002
        """An explicit error as a frame of this answer's own stream; ``None`` where it has none."""
        return None

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self])

    async def read_at_most(self, limit: int) -> bytes | None:
        """The whole body, or ``None`` and its request is ended when it is longer: a node may send without an end."""
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

    def _ended(self, outcome: Outcome) -> None:
        self.outcome = outcome
        if self.on_outcome is not None:
            told, self.on_outcome = self.on_outcome, None
            told(outcome)


class WholeAnswer(Answer):
    """One that is complete before anybody sees it."""

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
        self._given = False
        self.outcome = Outcome.SERVED if status < 500 else Outcome.SERVER_ERROR

    @property
    def counters(self) -> ServerCounters | None:
        return self._counters

    @property
    def body(self) -> bytes:
        return self._body

    async def __anext__(self) -> bytes:
        if self._given or not self._body:
            raise StopAsyncIteration
        self._given = True
        return self._body


def error_answer(node: str, kind: BackendKind, status: int, headers: HeaderPairs, problem: str) -> WholeAnswer:
    """In place of a server's answer that nobody may see. ``headers`` are without a Content-Type, ``problem`` a sentence
    about "it"."""
    message = f"{node}: {problem}"
    body = safe_json.dump_compact({"error": message})
    answer = WholeAnswer(node, kind, status, (("Content-Type", "application/json"), *headers), body)
    answer.error_message = message
    return answer
