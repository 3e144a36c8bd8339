"""What holds for each ``BatchStore``: how requests are claimed, released, recorded, cancelled and sent again. Each test
runs on SQLite, and on a real Redis."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from gpumesh.batches.base import BatchStore
from gpumesh.batches.values import (
    BatchCounts,
    BatchStatus,
    NewBatch,
    Release,
    Result,
)
from gpumesh.errors import BatchConflict, BatchNotFound
from tests.batches.stores import (
    ENDPOINT,
    LONG_S,
    OVER_SHORT_S,
    SHORT_S,
    StorePlace,
    answers,
    lines_of,
    requests_of,
    start_batch,
    store_lines,
)

# -- work --------------------------------------------------------------------------------------------------------


async def test_requests_are_claimed_by_batch_then_order_then_line(store: BatchStore, other: BatchStore) -> None:
    first = await start_batch(store, 5, orders=[b"b", b"\0", b"b\0", b"a\xff", b"b"])
    second = await start_batch(store, 2)
    claims = await store.claim("w", 3, lease_s=LONG_S) + await other.claim("v", 3, lease_s=LONG_S)
    assert lines_of(claims) == [2, 4, 1, 5, 3, 1]
    assert [claim.batch_id for claim in claims] == [first.id] * 5 + [second.id]
    assert (claims[0].content, claims[0].group, claims[0].endpoint) == (b"line 2", "00", ENDPOINT)
    assert (claims[0].owner, claims[0].expires_at, claims[0].tries, claims[0].lost) == ("", first.expires_at, 0, 0)
    assert (await other.get_batch(first.id)).counts == BatchCounts(total=5, claimed=5)
    assert await store.claim("w", 0, lease_s=LONG_S) == []
    assert lines_of(await store.claim("w", 9, lease_s=LONG_S)) == [2]
    assert await store.claim("w", 9, lease_s=LONG_S) == []


async def test_batches_that_are_left_to_others_are_claimed_only_when_their_window_has_passed(store: BatchStore) -> None:
    first, second = await start_batch(store, 2), await start_batch(store, 2)
    short = await start_batch(store, 1, new=NewBatch(ENDPOINT, first.new.input_file_id, window_s=SHORT_S))
    await asyncio.sleep(OVER_SHORT_S)
    claims = await store.claim("w", 9, lease_s=LONG_S, without=[first.id, short.id, "batch_none"])
    assert [claim.batch_id for claim in claims] == [second.id, second.id, short.id]
    assert [claim.batch_id for claim in await store.claim("w", 9, lease_s=LONG_S)] == [first.id, first.id]


async def test_many_requests_keep_their_order_and_no_two_workers_get_the_same(place: StorePlace) -> None:
    count = 2500
    async with place.open() as store, place.open() as other:
        orders = [b"%d" % (line % 7) for line in range(count)]
        await start_batch(store, count, orders=orders)
        taken = []
        while claims := await store.claim("w", 150, lease_s=LONG_S) + await other.claim("v", 150, lease_s=LONG_S):
            taken += claims
    assert [(claim.group, claim.line) for claim in taken] == sorted(
        (order.hex(), line) for line, order in enumerate(orders, 1)
    )


async def test_a_claim_whose_lease_has_ended_goes_to_another_worker(store: BatchStore, other: BatchStore) -> None:
    batch = await start_batch(store, 3)
    claims = await store.claim("killed", 2, lease_s=LONG_S)
    assert lines_of(await other.claim("v", 1, lease_s=LONG_S)) == [3]
    await store.renew("killed", claims, lease_s=SHORT_S)
    await asyncio.sleep(OVER_SHORT_S)
    assert (await store.get_batch(batch.id)).counts.claimed == 1
    again = await other.claim("v", 9, lease_s=LONG_S)
    assert [(claim.line, claim.lost, claim.tries) for claim in again] == [(1, 1, 0), (2, 1, 0)]
    assert await store.renew("killed", claims, lease_s=LONG_S) == {claim.key for claim in claims}
    await store.release("killed", [Release(claim) for claim in claims])
    assert await store.claim("w", 9, lease_s=LONG_S) == [], "what another worker has is not released"


async def test_a_renewed_claim_lasts(store: BatchStore, other: BatchStore) -> None:
    await start_batch(store, 2)
    claims = await store.claim("w", 2, lease_s=SHORT_S)
    assert await store.renew("w", claims[:1], lease_s=LONG_S) == set()
    await asyncio.sleep(OVER_SHORT_S)
    (claim,) = await other.claim("v", 9, lease_s=SHORT_S)
    assert (claim.line, claim.lost) == (2, 1)
    await asyncio.sleep(OVER_SHORT_S)
    assert await other.renew("v", [claim], lease_s=LONG_S) == set(), "nobody else has claimed it"
    assert await store.renew("w", [], lease_s=LONG_S) == set()


async def test_a_released_request_waits_for_its_delay_and_comes_first_again(
    store: BatchStore, other: BatchStore
) -> None:
    batch = await start_batch(store, 4)
    claims = await store.claim("w", 3, lease_s=LONG_S)
    await store.release("v", [Release(claims[0])])
    await store.release(
        "w", [Release(claims[0], LONG_S, counts=True), Release(claims[1]), Release(claims[2], SHORT_S, counts=True)]
    )
    assert (await store.get_batch(batch.id)).counts.claimed == 0
    assert lines_of(await other.claim("v", 1, lease_s=LONG_S)) == [2]
    await asyncio.sleep(OVER_SHORT_S)
    again = await other.claim("v", 9, lease_s=SHORT_S)
    assert [(claim.line, claim.tries, claim.lost) for claim in again] == [(3, 1, 0), (4, 0, 0)]
    await asyncio.sleep(OVER_SHORT_S)
    again = await other.claim("u", 9, lease_s=SHORT_S)
    assert [(claim.line, claim.tries, claim.lost) for claim in again] == [(3, 1, 1), (4, 0, 1)]
    await other.release("u", [Release(claim, counts=True) for claim in again])
    assert [(claim.tries, claim.lost) for claim in await store.claim("w", 9, lease_s=LONG_S)] == [(2, 1), (1, 1)]


async def test_each_request_gets_one_result_and_the_last_one_ends_the_batch(
    store: BatchStore, other: BatchStore
) -> None:
    batch = await start_batch(store, 3)
    first = await store.claim("w", 3, lease_s=SHORT_S)
    await asyncio.sleep(OVER_SHORT_S)
    second = await other.claim("v", 2, lease_s=LONG_S)
    assert await store.record("w", answers(first[:1])) == 1, "also when the lease has ended"
    assert await other.record("v", answers(second, failed=True)) == 1
    assert await store.record("w", answers(first[:2])) == 0
    found = await other.get_batch(batch.id)
    assert found.counts == BatchCounts(3, 1, 1, 0, len("answer 1\n"), len("answer 2\n"))
    assert found.counts.unfinished == 1
    assert found.status is BatchStatus.IN_PROGRESS
    (third,) = await other.claim("v", 9, lease_s=LONG_S)
    assert await other.record("v", answers([third, *second])) == 1
    found = await store.get_batch(batch.id)
    assert (found.status, found.counts.completed, found.counts.failed) == (BatchStatus.COMPLETED, 2, 1)
    assert found.ended_at is not None
    assert found.ended_at >= found.created_at
    assert await store.count_recent_results(batch.id, 60.0) == 3
    assert await store.record("w", []) == 0


async def test_workers_that_record_the_same_at_once(place: StorePlace) -> None:
    """Each of eight workers has had each of the requests, and all of them have an answer."""
    async with place.open() as store, place.open() as other:
        batch = await start_batch(store, 10)
        taken = []
        for worker in range(8):
            taken.append(await store.claim(f"{worker}", 10, lease_s=0.001))
            await asyncio.sleep(0.005)
        new = await asyncio.gather(
            *(
                (store, other)[index % 2].record(f"{index}", [Result(claim, b"of worker %d" % index)])
                for index, claims in enumerate(taken)
                for claim in claims
            )
        )
        assert sum(new) == 10
        results = await store.read_results(batch.id)
        assert Counter(result.line for result in results) == Counter(range(1, 11))
        assert (await other.get_batch(batch.id)).counts.completed == 10


async def test_a_batch_whose_window_has_passed(store: BatchStore) -> None:
    file = await store_lines(store, [b"line 1", b"line 2"])
    batch = await start_batch(store, 2, new=NewBatch(ENDPOINT, file.id, window_s=0.0))
    claims = await store.claim("w", 2, lease_s=LONG_S)
    assert claims[0].expires_at == batch.created_at
    await store.record("w", [Result(claims[0], b"late", failed=True, expired=True)])
    assert (await store.get_batch(batch.id)).status is BatchStatus.IN_PROGRESS
    await store.record("w", [Result(claims[1], b"still in time")])
    ended = await store.get_batch(batch.id)
    assert (ended.status, ended.counts.failed, ended.counts.completed) == (BatchStatus.EXPIRED, 1, 1)


# -- cancel, retry, delete ---------------------------------------------------------------------------------------


async def test_a_batch_without_work_under_way_is_cancelled_at_once(store: BatchStore, other: BatchStore) -> None:
    batch = await start_batch(store, 2)
    cancelled = await other.cancel(batch.id)
    assert cancelled.status is BatchStatus.CANCELLED
    assert cancelled.cancelling_at is not None
    assert cancelled.ended_at is not None
    assert await store.claim("w", 2, lease_s=LONG_S) == []
    assert await store.cancel(batch.id) == cancelled


async def test_a_batch_that_is_read_is_cancelled(store: BatchStore, other: BatchStore) -> None:
    lines = [b"a", b"b"]
    batch = await store.create_batch(NewBatch(ENDPOINT, (await store_lines(store, lines)).id))
    await store.add_requests(batch.id, requests_of(lines)[:1], [], after_line=0, through_line=1)
    assert (await other.cancel(batch.id)).status is BatchStatus.CANCELLED
    assert not await store.add_requests(batch.id, requests_of(lines)[1:], [], after_line=1, through_line=2)
    assert (await store.finish_validation(batch.id, through_line=1)).status is BatchStatus.CANCELLED


async def test_a_batch_that_was_cancelled_while_it_was_read_is_read_on(store: BatchStore, other: BatchStore) -> None:
    lines = [b"line 1", b"line 2"]
    batch = await store.create_batch(NewBatch(ENDPOINT, (await store_lines(store, lines)).id))
    await store.add_requests(batch.id, requests_of(lines)[:1], [], after_line=0, through_line=1)
    await store.cancel(batch.id)
    again = await other.retry(batch.id)
    assert (again.status, again.read_lines, again.ended_at) == (BatchStatus.VALIDATING, 1, None)
    assert await other.add_requests(batch.id, requests_of(lines)[1:], [], after_line=1, through_line=2)
    assert (await other.finish_validation(batch.id, through_line=2)).status is BatchStatus.IN_PROGRESS
    assert lines_of(await store.claim("w", 9, lease_s=LONG_S)) == [1, 2]


async def test_a_cancelled_batch_waits_for_the_requests_under_way(store: BatchStore, other: BatchStore) -> None:
    batch = await start_batch(store, 4)
    claims = await store.claim("w", 3, lease_s=LONG_S)
    assert (await other.cancel(batch.id)).status is BatchStatus.CANCELLING
    assert (await other.cancel(batch.id)).status is BatchStatus.CANCELLING
    assert await other.claim("v", 1, lease_s=LONG_S) == []
    with pytest.raises(BatchConflict):
        await other.delete_batch(batch.id)
    assert await store.record("w", answers(claims[:1])) == 1
    assert await store.renew("w", claims[1:], lease_s=LONG_S) == {claim.key for claim in claims[1:]}
    await store.settle()
    assert (await store.get_batch(batch.id)).status is BatchStatus.CANCELLING
    await store.release("w", [Release(claim) for claim in claims[1:]])
    await store.settle()
    ended = await store.get_batch(batch.id)
    assert (ended.status, ended.counts) == (BatchStatus.CANCELLED, BatchCounts(4, 1, 0, 0, len("answer 1\n")))
    assert [result.line for result in await other.read_results(batch.id)] == [1]


async def test_a_cancelled_batch_does_not_wait_for_a_killed_worker(store: BatchStore, other: BatchStore) -> None:
    batch = await start_batch(store, 1)
    await store.claim("killed", 1, lease_s=SHORT_S)
    await other.cancel(batch.id)
    await asyncio.sleep(OVER_SHORT_S)
    assert (await other.get_batch(batch.id)).status is BatchStatus.CANCELLED, "also if no worker lives"
    assert [found.status for found in await other.list_batches()] == [BatchStatus.CANCELLED]
    await other.settle()
    assert (await other.get_batch(batch.id)).status is BatchStatus.CANCELLED


async def test_a_cancelled_batch_whose_requests_all_get_results_is_completed(store: BatchStore) -> None:
    batch = await start_batch(store, 2)
    claims = await store.claim("w", 2, lease_s=LONG_S)
    await store.cancel(batch.id)
    await store.record("w", answers(claims))
    assert (await store.get_batch(batch.id)).status is BatchStatus.COMPLETED


async def test_a_batch_that_has_ended_is_not_cancelled(store: BatchStore) -> None:
    batch = await start_batch(store, 1)
    await store.record("w", answers(await store.claim("w", 1, lease_s=LONG_S)))
    with pytest.raises(BatchConflict):
        await store.cancel(batch.id)


async def test_retry_sends_what_has_failed_again(store: BatchStore, other: BatchStore) -> None:
    count = 1200  # more than one piece of it
    batch = await start_batch(store, count)
    with pytest.raises(BatchConflict):
        await store.retry(batch.id)
    claims = []
    while taken := await store.claim("w", 200, lease_s=LONG_S):
        claims += taken
    await store.release("w", [Release(claims[2], counts=True)])
    (tried,) = await store.claim("w", 1, lease_s=LONG_S)
    assert tried.tries == 1
    await store.record("w", answers(claims[:2]))
    for start in range(2, count, 200):
        await store.record("w", answers(claims[start : start + 200], failed=True))
    assert (await store.get_batch(batch.id)).status is BatchStatus.COMPLETED
    again = await other.retry(batch.id)
    assert (again.status, again.ended_at) == (BatchStatus.IN_PROGRESS, None)
    assert again.counts == BatchCounts(count, 2, 0, 0, 2 * len("answer 1\n"), 0)
    assert again.expires_at > batch.expires_at
    assert await store.read_results(batch.id, failed=True) == []
    retried = []
    while taken := await store.claim("w", 200, lease_s=LONG_S):
        retried += taken
        await store.record("w", answers(taken))
    assert [(claim.line, claim.tries, claim.lost) for claim in retried] == [
        (line, 0, 0) for line in range(3, count + 1)
    ]
    ended = await other.get_batch(batch.id)
    assert (ended.status, ended.counts.completed) == (BatchStatus.COMPLETED, count)
    assert await other.retry(batch.id) == ended, "there is nothing to send again"


async def test_retry_goes_on_with_a_cancelled_batch(store: BatchStore, other: BatchStore) -> None:
    batch = await start_batch(store, 4)
    claims = await store.claim("w", 2, lease_s=LONG_S)
    await store.release("w", [Release(claims[1], LONG_S, counts=True)])
    await store.cancel(batch.id)
    await store.release("w", [Release(claims[0], LONG_S)])
    await store.settle()
    again = await other.retry(batch.id)
    assert (again.status, again.cancelling_at, again.ended_at) == (BatchStatus.IN_PROGRESS, None, None)
    retried = await other.claim("v", 9, lease_s=LONG_S)
    assert [(claim.line, claim.tries) for claim in retried] == [(1, 0), (2, 0), (3, 0), (4, 0)]


async def test_a_deleted_batch_takes_its_results_along(store: BatchStore, other: BatchStore) -> None:
    batch = await start_batch(store, 2)
    claims = await store.claim("w", 2, lease_s=LONG_S)
    with pytest.raises(BatchConflict):
        await other.delete_batch(batch.id)
    await store.record("w", answers(claims))
    await other.delete_batch(batch.id)
    with pytest.raises(BatchNotFound):
        await store.get_batch(batch.id)
    with pytest.raises(BatchNotFound):
        await store.read_results(batch.id)
    assert await store.renew("w", claims, lease_s=LONG_S) == {claim.key for claim in claims}
    await store.release("w", [Release(claim) for claim in claims])
    assert await store.record("w", answers(claims)) == 0
    assert await store.list_batches() == []
    assert (await other.get_file(batch.new.input_file_id)).size > 0


# -- several processes ---------------------------------------------------------------------------------------------


async def test_what_is_stored_is_there_when_the_store_is_opened_again(place: StorePlace) -> None:
    async with place.open() as store:
        batch = await start_batch(store, 3)
        claims = await store.claim("w", 2, lease_s=SHORT_S)
        await store.record("w", answers(claims[:1]))
    await asyncio.sleep(OVER_SHORT_S)
    async with place.open() as store:
        await store.begin_work("v")
        assert (await store.get_batch(batch.id)).counts.completed == 1
        assert lines_of(await store.claim("v", 9, lease_s=LONG_S)) == [2, 3]


async def test_any_operations_of_several_workers_give_each_request_one_result(place: StorePlace) -> None:
    """Workers that claim, lose, release, renew and record in any order, until all is done."""
    chance = random.Random(7)
    async with place.open() as store, place.open() as other:
        batch = await start_batch(store, 60, orders=[b"%d" % chance.randrange(9) for _ in range(60)])

        async def work(worker: str, opened: BatchStore) -> None:
            await opened.begin_work(worker)
            while not (await opened.get_batch(batch.id)).status.has_ended:
                claims = await opened.claim(worker, chance.randrange(1, 9), lease_s=chance.choice([0.003, LONG_S]))
                await asyncio.sleep(chance.choice([0, 0, 0.005]))
                unwanted = await opened.renew(worker, claims, lease_s=LONG_S)
                kept = [claim for claim in claims if claim.key not in unwanted]
                chance.shuffle(kept)
                cut = chance.randrange(len(kept) + 1)
                await opened.release(worker, [Release(claim, counts=True) for claim in kept[:cut]])
                await opened.record(worker, answers(kept[cut:]))

        async with asyncio.timeout(50.0):
            await asyncio.gather(*(work(f"{index}", (store, other)[index % 2]) for index in range(4)))
        results = await store.read_results(batch.id)
        assert Counter(result.line for result in results) == Counter(range(1, 61))
        assert (await store.get_batch(batch.id)).counts == BatchCounts(
            60, 60, 0, 0, sum(len(result.content) + 1 for result in results), 0
        )
