"""Work for the scheduling benchmark, and the client that sends it: open loop, so a slow gateway gets no rest.

A piece of work is a ``Job``: one request, or a conversation whose next turn is sent a while after the last answer. The
latency of a request counts from the moment at which it should have been sent. Answers are streamed. An answer counts
only if its status is 200 and its last frame says ``done``; each other request is lost.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lean_client import Connection, request

CHAT = "/api/chat"


@dataclass(frozen=True, slots=True)
class Job:
    """One client's work: ``turns`` are the texts that it says, each after the answer to the last and ``pause_s``.

    ``at_s``: when the first is sent, in seconds after the start. ``hand``: the number of the node that it is sent to
    when the work is routed by hand; jobs with a ``hand_order`` are then sent one after the other in this order, if they
    are due at the same time. ``tokens``: the length of each answer. ``watched``: the requests of the scenario's
    question, for example the interactive ones behind a batch; the others are only load.
    """

    at_s: float
    hand: int
    model: str
    turns: tuple[str, ...]
    tokens: int
    system: str | None = None
    pause_s: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    watched: bool = False
    hand_order: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of one request. Times are in seconds of the monotonic clock, which all processes share.

    ``first_at`` is when the first piece of the body came, ``ended_at`` when the answer was complete, or when the client
    gave up: then ``ok`` is false.
    """

    due_at: float
    first_at: float | None
    ended_at: float
    ok: bool
    watched: bool

    @property
    def took_s(self) -> float:
        return self.ended_at - self.due_at


class Client:
    """Sends the work of one run to one route. ``address`` gives the host and port for a job.

    Connections are kept open, as clients' libraries do.
    """

    def __init__(self, address: Callable[[Job], tuple[str, int]]) -> None:
        self.sent: list[Sent] = []
        self._address = address
        self._idle: dict[tuple[str, int], list[_Exchange]] = {}
        self._watched_left = 0

    async def run(self, jobs: Sequence[Job], limit_s: float, *, ends_with_watched: bool = False) -> None:
        """Sends all jobs, and returns when all are answered or ``limit_s`` seconds after the last job's start.

        What is not answered by then is lost. ``ends_with_watched``: the run ends when the watched requests are
        answered, and only they are counted.
        """
        start = time.monotonic() + 0.05
        self._watched_left = sum(job.watched for job in jobs)
        tasks = [asyncio.create_task(self._run_job(job, start)) for job in jobs]
        watched = [task for task, job in zip(tasks, jobs, strict=True) if job.watched]
        last_start = max(job.at_s for job in jobs)
        await asyncio.wait(watched if ends_with_watched else tasks, timeout=last_start + limit_s)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for exchanges in self._idle.values():
            for exchange in exchanges:
                exchange.close()
        for result in results:
            if isinstance(result, Exception):
                raise result
        if ends_with_watched:
            self.sent = [sent for sent in self.sent if sent.watched]

    async def _run_job(self, job: Job, start: float) -> None:
        messages = [] if job.system is None else [{"role": "system", "content": job.system}]
        due_at = start + job.at_s
        for number, said in enumerate(job.turns):
            await asyncio.sleep(due_at - time.monotonic())
            messages.append({"role": "user", "content": said})
            is_last = number == len(job.turns) - 1
            answer = await self._ask(job, messages, due_at, keep=not is_last)
            if answer is None:  # the conversation cannot go on: its other turns are lost, too
                now = time.monotonic()
                self.sent += [Sent(now, None, now, ok=False, watched=job.watched) for _ in job.turns[number + 1 :]]
                return
            messages.append({"role": "assistant", "content": answer})
            due_at = time.monotonic() + job.pause_s

    async def _ask(self, job: Job, messages: list[dict[str, str]], due_at: float, *, keep: bool) -> str | None:
        """Sends one request and records what becomes of it. Returns the answer's text (empty unless ``keep``), or
        ``None`` if the request is lost."""
        body = json.dumps(
            {
                "model": job.model,
                "messages": messages,
                "stream": True,
                "options": {"num_predict": job.tokens, **job.options},
            }
        ).encode()
        address = self._address(job)
        idle = self._idle.setdefault(address, [])
        exchange = None
        ok = False
        try:
            while idle and (exchange is None or exchange.closed):
                exchange = idle.pop()
            if exchange is None or exchange.closed:
                exchange = await _Exchange.open(*address)
            ok = await exchange.ask(_build_request(address, job, body), keep=keep)
        except OSError:
            pass  # refused or reset: lost
        finally:
            first_at = exchange.first_at if exchange is not None else None
            self.sent.append(Sent(due_at, first_at, time.monotonic(), ok, job.watched))
            if exchange is not None and not ok:
                exchange.close()
        if not ok or exchange is None:
            return None
        idle.append(exchange)
        return exchange.read_text() if keep else ""


def _build_request(address: tuple[str, int], job: Job, body: bytes) -> bytes:
    host, port = address
    head, end, rest = request(f"{host}:{port}", body, CHAT).partition(b"\r\n\r\n")
    extra = "".join(f"\r\n{name}: {value}" for name, value in job.headers.items())
    return head + extra.encode() + end + rest


class _Exchange:
    """One connection, with at most one request at a time."""

    def __init__(self) -> None:
        self.first_at: float | None = None
        self._connection = Connection(self._on_answer, self._on_data)
        self._answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pieces: list[bytes] = []
        self._tail = b""
        self._keep = False

    @classmethod
    async def open(cls, host: str, port: int) -> _Exchange:
        exchange = cls()
        await asyncio.get_running_loop().create_connection(lambda: exchange._connection, host, port)
        return exchange

    @property
    def closed(self) -> bool:
        return self._connection.transport is None or self._connection.transport.is_closing()

    def close(self) -> None:
        if self._connection.transport is not None:
            self._connection.transport.close()

    async def ask(self, message: bytes, *, keep: bool) -> bool:
        """Sends the request and waits for the end of the answer. Returns whether the answer is complete.

        ``keep``: the bytes of the answer are kept for ``read_text``.
        """
        self.first_at, self._pieces, self._tail, self._keep = None, [], b"", keep
        self._answered = asyncio.get_running_loop().create_future()
        if self._connection.transport is None:
            return False
        self._connection.transport.write(message)
        return await self._answered == 200 and b'"done":true' in self._tail

    def read_text(self) -> str:
        """The text of the last answer. Each frame is a line of JSON between the lines of chunked encoding."""
        frames = [json.loads(line) for line in b"".join(self._pieces).split(b"\n") if line.startswith(b"{")]
        return "".join(frame["message"]["content"] for frame in frames)

    def _on_data(self, data: bytes) -> None:
        if self.first_at is None:
            self.first_at = time.monotonic()
        if self._keep:
            self._pieces.append(data)
        self._tail = (self._tail + data)[-600:]  # the last frame has its counters after ``done``

    def _on_answer(self, status: int) -> None:
        if not self._answered.done():
            self._answered.set_result(status)
