"""``ScriptedSender``: stands for a mesh. It answers what a test says, and notes what was sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gpumesh.batches.values import BatchRequest, Reply
from gpumesh.errors import GPUMeshError

Answer = Reply | GPUMeshError | Exception
OK = Reply(200, b'{"response": "yes"}', "n1")


class ScriptedSender:
    """``answer`` gives the answer to a request, or the error to raise. ``gate``: no answer comes before it is set."""

    def __init__(self, answer: Callable[[BatchRequest], Answer] = lambda _: OK) -> None:
        self.answer = answer
        self.gate = asyncio.Event()
        self.gate.set()
        self.sent: list[BatchRequest] = []
        self.most_at_once = 0
        self.cancelled = 0
        self._at_once = 0

    async def send(self, request: BatchRequest) -> Reply:
        self.sent.append(request)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await asyncio.sleep(0)
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self._at_once -= 1
        answer = self.answer(request)
        if isinstance(answer, Exception):
            raise answer
        return answer
