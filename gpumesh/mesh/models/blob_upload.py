"""Uploads one body (a model's blob) to several nodes at once, at the pace of the slowest node.

A node that fails gets no more pieces; the upload to the others goes on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence

from gpumesh.mesh.models.store_answers import NodeResult

QUEUED_PIECES = 4  # so many pieces of about 64 KiB may wait for a node that is slower than the client

Upload = Callable[[str, AsyncIterable[bytes]], Awaitable[NodeResult]]
"""Sends a body to the node of this name. Never raises because of what the node does."""


class PieceQueue:
    """The pieces of a body for one node, as an async iterable. An empty piece ends the body."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def __repr__(self) -> str:
        return f"<PieceQueue {len(self._pieces)} pieces{', closed' if self._closed else ''}>"

    async def put(self, piece: bytes) -> None:
        """Adds a piece, and waits for room while the queue is full. Drops the piece if the queue is closed."""
        while len(self._pieces) >= QUEUED_PIECES and not self._closed:
            await self._wait_for_change()
        if not self._closed:
            self._pieces.append(piece)
            self._changed.set()

    def close(self) -> None:
        """Drops the pieces in the queue and all pieces that follow, because the upload to this node has ended."""
        self._closed = True
        self._pieces.clear()
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yields the pieces as they come, until the empty piece, or until the queue is closed."""
        while not self._closed:
            if not self._pieces:
                await self._wait_for_change()
                continue
            piece = self._pieces.popleft()
            self._changed.set()
            if not piece:
                return
            yield piece

    async def _wait_for_change(self) -> None:
        """Returns at the next change of the queue."""
        self._changed.clear()
        await self._changed.wait()


async def upload_to_nodes(nodes: Sequence[str], pieces: AsyncIterable[bytes], upload: Upload) -> list[NodeResult]:
    """Uploads the body of ``pieces`` to all nodes, and returns the results in the order of ``nodes``. If all uploads
    end before the body does (all nodes have failed), the rest of ``pieces`` is not read."""
    queues = {node: PieceQueue() for node in nodes}

    async def upload_from_queue(node: str) -> NodeResult:
        """Uploads to one node. At the upload's end, also an early one, the queue takes no more pieces."""
        try:
            return await upload(node, queues[node])
        finally:
            queues[node].close()

    tasks = [asyncio.create_task(upload_from_queue(node), name=f"blob to {node}") for node in nodes]
    try:
        async for piece in pieces:
            for queue in queues.values():
                await queue.put(piece)
            if all(task.done() for task in tasks):
                break
        for queue in queues.values():
            await queue.put(b"")  # ends the body
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
