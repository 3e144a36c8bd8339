from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator

from gpumesh.mesh.models.blob_upload import QUEUED_PIECES, PieceQueue, upload_to_nodes
from gpumesh.mesh.models.store_answers import NodeResult


async def test_a_queue_holds_few_pieces_and_drops_them_when_it_is_closed() -> None:
    queue = PieceQueue()
    for number in range(QUEUED_PIECES):
        await queue.put(b"%d" % number)
    assert repr(queue) == f"<PieceQueue {QUEUED_PIECES} pieces>"
    waiting = asyncio.create_task(queue.put(b"more"))
    await asyncio.sleep(0)
    assert not waiting.done(), "the client is held back while the node is slow"
    pieces = aiter(queue)
    assert await anext(pieces) == b"0"
    await waiting
    queue.close()
    await queue.put(b"for a node that is gone")
    assert [piece async for piece in pieces] == []
    assert repr(queue) == "<PieceQueue 0 pieces, closed>"


async def test_a_body_is_not_read_on_when_no_node_takes_more() -> None:
    read: list[int] = []

    async def pieces() -> AsyncIterator[bytes]:
        for number in range(1000):
            read.append(number)
            yield b"x"
            await asyncio.sleep(0)

    async def refuse(node: str, body: AsyncIterable[bytes]) -> NodeResult:
        return NodeResult(node, 507, "no space left on device")

    results = await upload_to_nodes(["a", "b"], pieces(), refuse)
    assert [(result.node, result.status) for result in results] == [("a", 507), ("b", 507)]
    assert len(read) < 10
