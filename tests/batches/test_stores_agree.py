"""Both stores do the same: random calls are made to each, and their answers are compared."""

from __future__ import annotations

import random
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gpumesh.batches.base import BatchStore
from gpumesh.batches.values import Batch, Claim, NewBatch, Release, Result
from gpumesh.errors import BatchConflict, BatchNotFound
from tests.batches.stores import ENDPOINT, LONG_S, StorePlace, requests_of, store_lines
from tests.prerequisites import needs
from tests.redis_server import RedisServer

WORKERS = ("v", "w")
CALLS = 120
BATCHES = 3
LINES = 8


Call = Callable[[str], Awaitable[object]]


class Player:
    """Makes calls to one store. Two players with chances of the same seed make the same calls, as long as the stores
    answer the same. ``answers`` has what can be compared: ids and times differ."""

    def __init__(self, store: BatchStore, chance: random.Random) -> None:
        self._store = store
        self._chance = chance
        self._ids: list[str] = []
        self._held: dict[str, list[Claim]] = {worker: [] for worker in WORKERS}
        self._lost: list[Claim] = []  # that were released or recorded: late calls with them come too
        self.answers: list[object] = []

    async def play(self) -> list[object]:
        calls: list[Call] = [*[self._claim] * 4, *[self._record] * 4, *[self._release] * 2]
        calls += [self._renew, self._late_record, self._late_release, self._cancel, self._retry, self._retry]
        calls += [self._delete, self._settle, self._read, self._validate]
        for _ in range(BATCHES):
            await self._begin()
        for _ in range(CALLS):
            call = self._chance.choice(calls)
            try:
                answer = await call(self._chance.choice(WORKERS))
            except (BatchConflict, BatchNotFound) as error:
                answer = type(error).__name__
            batches = [self._describe(batch) for batch in await self._store.list_batches()]
            self.answers.append((call.__name__, answer, batches))
        return self.answers

    async def _begin(self) -> None:
        lines = [b"line %d" % number for number in range(LINES)]
        file = await store_lines(self._store, lines)
        batch = await self._store.create_batch(NewBatch(ENDPOINT, file.id))
        self._ids.append(batch.id)
        requests = requests_of(lines, [self._chance.choice([b"", b"a", b"ab", b"b\0"]) for _ in lines])
        await self._store.add_requests(batch.id, requests[:5], [], after_line=0, through_line=5)
        if self._chance.random() < 0.7:
            await self._store.add_requests(batch.id, requests[5:], [], after_line=5, through_line=LINES)
            await self._store.finish_validation(batch.id, through_line=LINES)

    def _describe(self, batch: Batch) -> object:
        times = [time is not None for time in (batch.in_progress_at, batch.cancelling_at, batch.ended_at)]
        return self._ids.index(batch.id), batch.status, batch.counts, times, batch.read_lines

    def _name(self, claim: Claim) -> object:
        return self._ids.index(claim.batch_id), claim.line, claim.tries, claim.lost, claim.group, claim.content

    def _some(self, claims: list[Claim]) -> list[Claim]:
        return self._chance.sample(claims, self._chance.randrange(len(claims) + 1))

    def _take(self, worker: str) -> list[Claim]:
        """Some of the claims of a worker, which it gives up."""
        claims = self._some(self._held[worker])
        self._held[worker] = [claim for claim in self._held[worker] if claim not in claims]
        self._lost += claims
        return claims

    async def _claim(self, worker: str) -> object:
        claims = await self._store.claim(worker, self._chance.randrange(5), lease_s=LONG_S)
        self._held[worker] += claims
        return [self._name(claim) for claim in claims]

    def _results(self, claims: list[Claim]) -> list[Result]:
        kinds = [(False, False), (False, False), (True, False), (True, True)]
        return [Result(claim, b"of %d" % claim.line, *self._chance.choice(kinds)) for claim in claims]

    async def _record(self, worker: str) -> object:
        return await self._store.record(worker, self._results(self._take(worker)))

    async def _late_record(self, worker: str) -> object:
        return await self._store.record(worker, self._results(self._some(self._lost[-3:])))

    def _releases(self, claims: list[Claim]) -> list[Release]:
        return [
            Release(claim, self._chance.choice([0.0, 0.0, LONG_S]), self._chance.random() < 0.5) for claim in claims
        ]

    async def _release(self, worker: str) -> None:
        await self._store.release(worker, self._releases(self._take(worker)))

    async def _late_release(self, worker: str) -> None:
        await self._store.release(worker, self._releases(self._some(self._lost[-3:])))

    async def _renew(self, worker: str) -> object:
        unwanted = await self._store.renew(worker, self._held[worker], lease_s=LONG_S)
        claims = [claim for claim in self._held[worker] if claim.key in unwanted]
        self._held[worker] = [claim for claim in self._held[worker] if claim.key not in unwanted]
        self._lost += claims
        return [self._name(claim) for claim in claims]

    async def _cancel(self, _: str) -> object:
        return self._describe(await self._store.cancel(self._chance.choice(self._ids)))

    async def _retry(self, _: str) -> object:
        return self._describe(await self._store.retry(self._chance.choice(self._ids)))

    async def _delete(self, _: str) -> None:
        if self._chance.random() < 0.3:
            await self._store.delete_batch(self._chance.choice(self._ids))

    async def _settle(self, _: str) -> None:
        await self._store.settle()

    async def _validate(self, _: str) -> object:
        batch_id = self._chance.choice(self._ids)
        read_lines = (await self._store.get_batch(batch_id)).read_lines
        return self._describe(await self._store.finish_validation(batch_id, through_line=read_lines))

    async def _read(self, _: str) -> object:
        batch_id = self._chance.choice(self._ids)
        failed = self._chance.choice([None, True, False])
        results = await self._store.read_results(batch_id, failed=failed)
        by_line = await self._store.read_results_by_line(batch_id, after_line=self._chance.randrange(LINES))
        return [[(result.line, result.content, result.failed) for result in read] for read in (results, by_line)]


@pytest.mark.real
@needs("redis-server")
@pytest.mark.parametrize("seed", range(6))
async def test_the_stores_agree(tmp_path: Path, redis_server: RedisServer, seed: int) -> None:
    name = f"agree-{secrets.token_hex(4)}"
    played = []
    for server in (None, redis_server):
        async with StorePlace(tmp_path / name, server).open() as store:
            played.append(await Player(store, random.Random(seed)).play())
    for call, (in_sqlite, in_redis) in enumerate(zip(*played, strict=True)):
        assert in_sqlite == in_redis, f"call {call} of seed {seed}"
