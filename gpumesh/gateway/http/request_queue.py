"""The queue of the requests that have been read from one connection and wait for their answers."""

from __future__ import annotations

from collections import deque

from gpumesh.gateway.http.parser import Refusal
from gpumesh.gateway.http.request import Request

# With more than this, the connection is not read until its handlers have caught up.
MAX_QUEUED = 16  # requests that wait behind the one that is being answered
MAX_BUFFERED_BODY_BYTES = 256 << 10  # bytes of bodies that wait for their handlers


class RequestQueue:
    """The last item may be a refusal of the bytes that followed the requests. ``incoming`` is the request whose body is
    being read; its handler may be running already. Only the methods here change ``waiting``."""

    def __init__(self) -> None:
        self.incoming: Request | None = None
        self.waiting: deque[Request | Refusal] = deque()

    def __repr__(self) -> str:
        return f"<RequestQueue {len(self.waiting)} queued, incoming {self.incoming!r}>"

    def __len__(self) -> int:
        return len(self.waiting)

    @property
    def is_full(self) -> bool:
        return len(self.waiting) > MAX_QUEUED

    @property
    def incoming_fits(self) -> bool:
        """The incoming body has so few waiting bytes that the connection may be read on."""
        return self.incoming is None or self.incoming.body.buffered <= MAX_BUFFERED_BODY_BYTES

    def add(self, item: Request | Refusal) -> None:
        self.waiting.append(item)
        if isinstance(item, Request):
            self.incoming = item

    def pop(self) -> Request | Refusal:
        return self.waiting.popleft()

    def feed_body(self, data: bytes) -> bool:
        """Adds to the incoming body. Returns whether the waiting bytes of all bodies are few enough to read on."""
        if self.incoming is None:
            return True
        buffered = self.incoming.body.feed(data)
        if len(self.waiting) > 1:  # bodies of earlier requests may wait too
            buffered = sum(item.body.buffered for item in self.waiting if isinstance(item, Request))
        return buffered <= MAX_BUFFERED_BODY_BYTES

    def end_body(self, *, broken: bool = False) -> None:
        """The incoming body is complete; or it is ``broken``, which its handler will report."""
        if self.incoming is not None:
            self.incoming.body.end(broken=broken)
            self.incoming = None

    def clear(self) -> None:
        """Drops the waiting requests and frees their bodies: they will never be answered."""
        for item in self.waiting:
            if isinstance(item, Request):
                item.body.release()
        self.waiting.clear()
