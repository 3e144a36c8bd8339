"""A stand-in Ollama with slots, as cheap as Python can be: it counts the requests that wait in it for a slot.

``POST /api/chat`` with ``stream: false`` takes a slot for ``options.num_predict`` milliseconds, and is then answered.
While all slots are taken, a request waits for one: first come, first served. A gateway that knows the slots of a server
never lets a request wait there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator
from typing import cast

MODEL = "bench:1b"


def _answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


_WHOLE = _answer(
    b'{"model":"bench:1b","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":"Hello."},'
    b'"done":true,"done_reason":"stop","total_duration":1000000,"load_duration":1000,"prompt_eval_count":8,'
    b'"prompt_eval_duration":1000,"eval_count":2,"eval_duration":1000000}'
)
# Each server has stored its model at another time. Otherwise gateways would take all of them for one server.
_TAGS = (
    b'{"models":[{"name":"bench:1b","model":"bench:1b","modified_at":"2026-01-01T00:00:00.%09dZ","size":1073741824,'
    b'"digest":"0","details":{"family":"bench","parameter_size":"1B","quantization_level":"Q4_K_M"}}]}'
)
_PS = _answer(
    b'{"models":[{"name":"bench:1b","model":"bench:1b","size":1073741824,"digest":"0","details":{"family":"bench"},'
    b'"expires_at":"2099-01-01T00:00:00Z","size_vram":1073741824,"context_length":4096}]}'
)
_GETS = {b"/": _answer(b"Ollama is running"), b"/api/version": _answer(b'{"version":"0.12.6"}')}
_GETS |= {b"/api/ps": _PS}
_MISSING = _answer(b'{"error":"not found"}').replace(b"200 OK", b"404 Not Found")


class SlotServer:
    """One server with so many slots. ``order`` are the prompts in the order in which they got a slot.

    ``waited`` counts the requests that had to wait here. ``most_waiting`` and ``most_running`` are the largest numbers
    at one moment.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.port = 0
        self.gets: dict[bytes, bytes] = {}
        self.running = self.served = self.waited = self.most_waiting = self.most_running = 0
        self.order: list[str] = []
        self.connections: set[_Connection] = set()
        self._waiting: deque[_Connection] = deque()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def forget(self) -> None:
        """Begins to count anew."""
        self.served = self.waited = 0
        self.most_waiting, self.most_running = len(self._waiting), self.running
        self.order.clear()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[SlotServer]:
        server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.gets = {**_GETS, b"/api/tags": _answer(_TAGS % self.port)}
        async with server:
            yield self
            for connection in self.connections.copy():
                connection.close()

    # -- for the connections -------------------------------------------------------------------------------------

    def take_slot(self, connection: _Connection) -> None:
        if self.running < self.slots:
            self.begin(connection)
            return
        self._waiting.append(connection)
        self.waited += 1
        self.most_waiting = max(self.most_waiting, len(self._waiting))

    def begin(self, connection: _Connection) -> None:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.order.append(connection.prompt)
        connection.begin()

    def free_slot(self) -> None:
        self.running -= 1
        while self._waiting and self.running < self.slots:
            self.begin(self._waiting.popleft())

    def forget_waiting(self, connection: _Connection) -> None:
        with contextlib.suppress(ValueError):
            self._waiting.remove(connection)


class _Connection(asyncio.Protocol):
    """One client's connection: its requests are answered one after the other."""

    def __init__(self, server: SlotServer) -> None:
        self.prompt = ""
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._answer_s = 0.0
        self._asked = False  # a request for an answer has come and is not answered
        self._timer: asyncio.TimerHandle | None = None  # while it has a slot

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._server.free_slot()
        elif self._asked:
            self._server.forget_waiting(self)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while not self._asked and self._transport is not None:
            head, separator, rest = self._buffer.partition(b"\r\n\r\n")
            if not separator:
                return
            at = head.lower().find(b"content-length:")
            length = 0 if at < 0 else int(head[at + 15 :].split(b"\r", 1)[0])
            if len(rest) < length:
                return
            self._buffer = rest[length:]
            method, path, _ = head.split(b" ", 2)
            if method == b"POST" and path == b"/api/chat":
                asked = json.loads(rest[:length])
                self.prompt = asked["messages"][-1]["content"]
                self._answer_s = asked.get("options", {}).get("num_predict", 10) / 1000
                self._asked = True
                self._server.take_slot(self)
            else:
                self._transport.write(self._server.gets.get(path, _MISSING))

    def begin(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._answer_s, self._end)

    def _end(self) -> None:
        self._timer, self._asked = None, False
        self._server.served += 1
        # Free before the gateway knows of the end: the gateway's next request must find the slot free.
        self._server.free_slot()
        if self._transport is not None:
            self._transport.write(_WHOLE)
            self.data_received(b"")
