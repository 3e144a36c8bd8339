"""``RequestQueue``: the requests that have been read from one connection and wait for their answers."""

from __future__ import annotations

from collections import deque

from gpumesh.gateway.http.parser import Refusal
from gpumesh.gateway.http.request import Request

# While a connection has more than this, nothing more is read from it.
MAX_QUEUED = 16  # requests that wait behind the request that is being answered
MAX_BUFFERED_BODY_BYTES = 256 << 10  # bytes of bodies that wait for their handlers


class RequestQueue:
    """Holds the requests of one connection that wait for their answers. The last entry may be the refusal of bytes that
    followed the requests. ``incoming`` is the request whose body is being read; its handler may be running already.
    Only the methods here change ``waiting``."""

    def __init__(self) -> None:
        self.incoming: Request | None = None
        self.waiting: deque[Request | Refusal] = deque()

    def __repr__(self) -> str:
        return f"<RequestQueue {len(self.waiting)} queued, incoming {self.incoming!r}>"

    def __len__(self) -> int:
        return len(self.waiting)

    @property
    def is_full(self) -> bool:
        """Whether so many requests wait that the connection must not be read on."""
        return len(self.waiting) > MAX_QUEUED

    @property
    def incoming_fits(self) -> bool:
        """Whether the incoming body has so few waiting bytes that the connection may be read on."""
        return self.incoming is None or self.incoming.body.buffered <= MAX_BUFFERED_BODY_BYTES

    def add(self, entry: Request | Refusal) -> None:
        """Adds a request, whose body comes next, or a refusal."""
        self.waiting.append(entry)
        if isinstance(entry, Request):
            self.incoming = entry

    def pop(self) -> Request | Refusal:
        """Removes and returns the entry that waits the longest."""
        return self.waiting.popleft()

    def feed_body(self, data: bytes) -> bool:
        """Adds a piece to the incoming body. Returns whether all bodies have so few waiting bytes that the connection
        may be read on."""
        if self.incoming is None:
            return True
        buffered = self.incoming.body.feed(data)
        if len(self.waiting) > 1:  # bodies of earlier requests may wait too
            buffered = sum(entry.body.buffered for entry in self.waiting if isinstance(entry, Request))
        return buffered <= MAX_BUFFERED_BODY_BYTES

    def end_body(self, *, broken: bool = False) -> None:
        """Ends the incoming body. If the body is ``broken``, its handler will report that."""
        if self.incoming is not None:
            self.incoming.body.end(broken=broken)
            self.incoming = None

    def clear(self) -> None:
        """Drops the waiting requests, which will never be answered, and frees their bodies."""
        for entry in self.waiting:
            if isinstance(entry, Request):
                entry.body.release()
        self.waiting.clear()
