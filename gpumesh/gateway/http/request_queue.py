"""The requests of one connection that have been read and wait for their answers, in their order."""

from __future__ import annotations

from collections import deque

from gpumesh.gateway.http.parser import Refusal
from gpumesh.gateway.http.request import Request

MAX_QUEUED = 16  # requests that wait behind the one that is answered, until the client is no longer read
MAX_BUFFERED_BODY_BYTES = 256 << 10  # bytes of bodies that wait for their handlers, until the client is no longer read


class RequestQueue:
    """The last item may be a refusal of what followed the requests. ``incoming`` is the request whose body is being
    read; it may be under way already. ``waiting`` is changed by the methods here alone."""

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
        """The handler has taken most of the body that is being read."""
        return self.incoming is None or self.incoming.body.buffered <= MAX_BUFFERED_BODY_BYTES

    def add(self, item: Request | Refusal) -> None:
        self.waiting.append(item)
        if isinstance(item, Request):
            self.incoming = item

    def pop(self) -> Request | Refusal:
        return self.waiting.popleft()

    def feed_body(self, data: bytes) -> bool:
        """Adds to the body that is being read. Says whether the bodies that wait are small enough to read on."""
        if self.incoming is None:
            return True
        buffered = self.incoming.body.feed(data)
        if len(self.waiting) > 1:  # several bodies may wait
            buffered = sum(item.body.buffered for item in self.waiting if isinstance(item, Request))
        return buffered <= MAX_BUFFERED_BODY_BYTES

    def end_body(self, *, broken: bool = False) -> None:
        """The body that was being read is complete, or never will be: then whoever reads it reports that."""
        if self.incoming is not None:
            self.incoming.body.end(broken=broken)
            self.incoming = None

    def clear(self) -> None:
        """Those that wait will never be answered."""
        for item in self.waiting:
            if isinstance(item, Request):
                item.body.release()
        self.waiting.clear()
