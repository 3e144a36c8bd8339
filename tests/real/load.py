"""Clients of a gateway that ask for one answer after another, and what the mesh said of its nodes meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import aiohttp

from gpumesh.event_loop.async_iterators import closing_iterator
from gpumesh.mesh.mesh import Mesh
from gpumesh.state import TunnelPhase

REQUEST_S = 60.0


@dataclass
class Load:
    """``failures`` says what each failed request got; ``slowest_s`` is of a whole answer."""

    url: str
    model: str
    answers: int = 0
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    @contextlib.asynccontextmanager
    async def running(self, clients: int = 8) -> AsyncIterator[Load]:
        """As many clients at once, every other of which takes its answers as streams."""
        timeout = aiohttp.ClientTimeout(total=REQUEST_S)
        stop = asyncio.Event()
        async with aiohttp.ClientSession(timeout=timeout) as http:
            # Not a TaskGroup: what the block raises should reach the test as it is, not in a group.
            tasks = [asyncio.create_task(self._client(http, stop, number)) for number in range(clients)]
            try:
                yield self
            finally:
                stop.set()
                await asyncio.gather(*tasks)

    async def _client(self, http: aiohttp.ClientSession, stop: asyncio.Event, number: int) -> None:
        stream = number % 2 == 0
        count = 0
        while not stop.is_set():
            count += 1
            prompt = f"client {number}, question {count}: why?"
            body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "stream": stream}
            began = time.monotonic()
            try:
                async with http.post(f"{self.url}/api/chat", json=body) as answer:
                    text = await answer.text()
                    wrong = find_problem(answer.status, text)
            except (aiohttp.ClientError, TimeoutError) as error:
                wrong = f"{type(error).__name__}: {error}"
            self.answers += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            if wrong is not None:
                self.failures.append(f"{'stream' if stream else 'whole'}: {wrong}")

    async def wait_for_answers(self, count: int) -> None:
        """Returns when so many more requests have been answered."""
        wanted = self.answers + count
        while self.answers < wanted:
            await asyncio.sleep(0.02)


def find_problem(status: int, text: str) -> str | None:
    """``None`` for an answer that is complete."""
    if status != 200:
        return f"{status} {text[:200]}"
    try:
        frames = [json.loads(line) for line in text.splitlines() if line]
    except ValueError:
        return f"not JSON: {text[-200:]!r}"
    if not frames or not frames[-1].get("done"):
        return f"cut after {len(frames)} frames: {text[-200:]!r}"
    return None


@dataclass(frozen=True)
class NodeObservation:
    """A node at a moment (monotonic, s). ``usable``: the balancer gives it requests."""

    at: float
    phase: TunnelPhase
    code: str | None
    usable: bool
    reconnects: int
    port: int | None


class NodeWatch:
    """Notes each change of some nodes of a mesh."""

    def __init__(self, mesh: Mesh, nodes: list[str]) -> None:
        self._mesh = mesh
        self.seen: dict[str, list[NodeObservation]] = {node: [self._look(node)] for node in nodes}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[NodeWatch]:
        task = asyncio.create_task(self._note())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _note(self) -> None:
        async with closing_iterator(self._mesh.watch_changes()) as changes:
            async for _ in changes:
                for node, seen in self.seen.items():
                    now = self._look(node)
                    if (now.phase, now.code, now.usable) != (seen[-1].phase, seen[-1].code, seen[-1].usable):
                        seen.append(now)

    def _look(self, node: str) -> NodeObservation:
        state = self._mesh.tunnel(node).state
        usable = node in self._mesh.usable_nodes()
        return NodeObservation(
            time.monotonic(), state.state, state.error_code, usable, state.reconnects, state.local_port
        )

    def now(self, node: str) -> NodeObservation:
        return self._look(node)

    def first(self, node: str, since: float, condition: Callable[[NodeObservation], bool]) -> NodeObservation | None:
        """The first note after ``since`` for which ``condition`` holds."""
        return next((one for one in self.seen[node] if one.at >= since and condition(one)), None)

    async def wait(
        self, node: str, since: float, condition: Callable[[NodeObservation], bool], *, within_s: float
    ) -> NodeObservation:
        """As ``first``, when there is one. Raises ``TimeoutError`` with what was seen instead."""
        ends = time.monotonic() + within_s
        while (found := self.first(node, since, condition)) is None:
            if time.monotonic() > ends:
                story = ", ".join(f"{one.at - since:+.2f} s {one.phase} {one.code or ''}" for one in self.seen[node])
                raise TimeoutError(f"{node} in {within_s:g} s: {story}")
            await asyncio.sleep(0.01)
        return found
