"""Both batch stores, for tests that hold for each: opened as two processes would open them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpumesh.batches.base import BatchStore
from gpumesh.batches.opening import create_batch_store
from gpumesh.batches.values import Batch, Claim, NewBatch, NewRequest, Result, StoredFile
from gpumesh.topology import RedisSpec, Topology
from tests.redis_server import RedisServer

ENDPOINT = "/v1/chat/completions"
LONG_S = 60.0  # a lease or a delay that does not end in a test
SHORT_S = 0.02  # one that ends
OVER_SHORT_S = 0.06  # so long a test waits until it has ended


@dataclass(frozen=True)
class StorePlace:
    """Where the batches of one test are: in a file of its own, or under a name of a mesh of its own in a Redis. Each
    store that ``open`` returns is as that of another process."""

    path: Path
    redis: RedisServer | None = None

    def open(self) -> BatchStore:
        topology = Topology(self.path.name, (), redis=None if self.redis is None else RedisSpec(self.redis.url))
        return create_batch_store(topology, self.path)


async def one_chunk(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def store_lines(store: BatchStore, lines: Sequence[bytes]) -> StoredFile:
    return await store.create_file("lines.jsonl", one_chunk(b"".join(line + b"\n" for line in lines)))


def requests_of(lines: Sequence[bytes], orders: Sequence[bytes] = ()) -> list[NewRequest]:
    """A request for each line, in groups that are named by its order."""
    requests, offset = [], 0
    for index, line in enumerate(lines):
        order = orders[index] if orders else b""
        requests.append(NewRequest(index + 1, offset, len(line), order, order.hex()))
        offset += len(line) + 1
    return requests


async def start_batch(
    store: BatchStore, count: int = 3, *, orders: Sequence[bytes] = (), new: NewBatch | None = None
) -> Batch:
    """A batch of ``count`` requests that is in progress. The lines are ``line 1``, ``line 2`` …"""
    lines = [b"line %d" % number for number in range(1, count + 1)]
    file = await store_lines(store, lines)
    batch = await store.create_batch(new or NewBatch(ENDPOINT, file.id))
    assert await store.add_requests(batch.id, requests_of(lines, orders), [], after_line=0, through_line=count)
    return await store.finish_validation(batch.id, through_line=count)


def answers(claims: Sequence[Claim], *, failed: bool = False) -> list[Result]:
    return [Result(claim, b"answer %d" % claim.line, failed) for claim in claims]


def lines_of(claims: Sequence[Claim]) -> list[int]:
    return [claim.line for claim in claims]
