"""``BatchWorker``: takes requests out of a store, sends them through the mesh, and records their results.

It keeps about as many requests under way as the mesh has slots, and a few more, which wait in the mesh's queue at
priority ``batch``: so a slot that becomes free is used at once, unless another request waits. Each request is sent at
least once. Its result is recorded exactly once, by the store. What the worker decides is in ``retries.py``; what it
writes, in ``result_lines.py``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from gpumesh.batches.base import BatchStore, Sender
from gpumesh.batches.request_lines import LineProblem, read_request_line
from gpumesh.batches.result_lines import make_error_result, make_expired_result, make_result, request_id
from gpumesh.batches.retries import MAX_LOST, TryAgain, judge_error, judge_reply
from gpumesh.batches.store_patience import StorePatience
from gpumesh.batches.validation import validate_batch
from gpumesh.batches.values import BatchRequest, BatchStatus, Claim, Release, Result
from gpumesh.errors import BatchError, BatchOwnerUnknown, BatchStoreError, GPUMeshError

log = logging.getLogger(__name__)

LEFT_S = 60.0  # so long a batch is left to other gateways; by then mesh.yaml may have its key
MAX_UNDER_WAY = 512
RESULTS_AT_A_TIME = 64  # that are recorded together
SEND_TIMEOUT_S = 3600.0  # of one try, waiting in the queue included


@dataclass(frozen=True, slots=True)
class WorkTimes:
    """The times of a worker, in seconds.

    ``renew_s``: between two renewals of the leases; so long may a cancelled request go on. ``idle_s``: between two
    looks for requests while there are none; so late may one be sent that had to wait. ``settle_s``: between two calls
    of ``settle``. ``pause_s``: after a failure of the store; each later pause is twice as long, up to
    ``longest_pause_s``."""

    lease_s: float = 30.0
    renew_s: float = 2.0
    idle_s: float = 2.0
    settle_s: float = 5.0
    pause_s: float = 1.0
    longest_pause_s: float = 10.0


@dataclass(slots=True, eq=False)
class _Work:
    """A claimed request. ``is_unwanted``: the store wants no result of it any more."""

    claim: Claim
    task: asyncio.Task[None] | None = None
    is_unwanted: bool = False


class BatchWorker:
    """Works on the batches of ``store`` while ``run`` runs.

    ``count_slots`` returns how many requests the mesh can run at once. ``clock`` returns seconds since 1970.
    ``on_problem`` gets the error while the store cannot be used, and ``None`` when it can be used again.
    """

    def __init__(
        self,
        store: BatchStore,
        sender: Sender,
        *,
        count_slots: Callable[[], int],
        times: WorkTimes | None = None,
        clock: Callable[[], float] = time.time,
        on_problem: Callable[[BatchStoreError | None], None] = lambda _: None,
    ) -> None:
        self.name = secrets.token_hex(8)
        self._store = store
        self._sender = sender
        self._count_slots = count_slots
        self._times = times or WorkTimes()
        self._clock = clock
        self._patience = StorePatience(on_problem, self._times.pause_s, self._times.longest_pause_s)
        self._under_way: dict[tuple[str, int], _Work] = {}  # until the store has the result or the release
        self._results: list[Result] = []  # to be recorded
        self._releases: list[Release] = []  # to be released
        # Batches of which nothing is claimed, by their ids: since when, and until when.
        self._paused: dict[str, tuple[float, float]] = {}
        self._reported: set[str] = set()  # batches of which the log says that they wait
        self._has_room = asyncio.Event()
        self._has_news = asyncio.Event()  # something may be there to be claimed
        self._has_output = asyncio.Event()

    def __repr__(self) -> str:
        state = "OK" if self._patience.problem is None else "STORE AWAY"
        return f"<BatchWorker {self.name} {state} {len(self._under_way)} under way>"

    async def run(self) -> None:
        """Works until it is cancelled. Then ends the requests under way, and gives them back to the store."""
        try:
            await self._patience.use_store(lambda: self._store.begin_work(self.name))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._claim_requests(group), name="batch claims")
                group.create_task(self._write_output(), name="batch results")
                group.create_task(self._renew_claims(), name="batch leases")
                group.create_task(self._watch_store(), name="batch store")
        finally:
            with suppress(BatchStoreError):  # the leases end by themselves
                await self._give_back()

    # -- what is under way ---------------------------------------------------------------------------------------

    async def _claim_requests(self, group: asyncio.TaskGroup) -> None:
        """Claims requests whenever there is room for some, and begins them."""
        while True:
            most, least = self._limits()
            room = most - len(self._under_way)
            if room < least:
                self._has_room.clear()
                await self._has_room.wait()
                continue
            self._has_news.clear()
            paused = self._list_paused()
            claim = partial(self._store.claim, self.name, room, lease_s=self._times.lease_s, without=paused)
            claims = await self._patience.use_store(claim)
            for request in claims:
                if request.key in self._under_way:  # its lease has ended, as this process stood still or Redis was away
                    continue
                work = self._under_way[request.key] = _Work(request)
                work.task = group.create_task(self._work_on(request), name="batch request")
                work.task.add_done_callback(partial(self._note_cancelled, work))
            if not claims:
                with suppress(TimeoutError):
                    async with asyncio.timeout(
                        self._times.idle_s
                    ):  # ``wait_for`` may lose a cancellation (Python 3.11)
                        await self._has_news.wait()

    def _pause(self, batch_id: str, seconds: float, reason: str) -> None:
        """Claims nothing of a batch for so long."""
        if batch_id not in self._reported:  # once, until it has a result again
            self._reported.add(batch_id)
            log.info("the batch %s waits for %.0f s: %s", batch_id, seconds, reason, extra={"event": "batch"})
        now = self._clock()
        self._paused[batch_id] = now, now + seconds

    def _list_paused(self) -> list[str]:
        """The batches of which nothing is claimed now."""
        now = self._clock()  # before a pause has begun if the clock was set back
        paused = {batch_id: times for batch_id, times in self._paused.items() if times[0] <= now < times[1]}
        self._paused = paused
        return list(paused)

    def _limits(self) -> tuple[int, int]:
        """How many requests may be under way, and for how many of them there must be room before more are claimed: to
        claim several at a time costs less."""
        slots = max(self._count_slots(), 1)
        spare = max(slots // 4, 2)
        return min(slots + spare, MAX_UNDER_WAY), max(spare // 2, 1)

    def _note_cancelled(self, work: _Work, task: asyncio.Task[None]) -> None:
        """Releases a request that was ended because it is not wanted any more. Called when its task has ended."""
        if task.cancelled() and work.is_unwanted:
            self._releases.append(Release(work.claim))
            self._has_output.set()

    async def _work_on(self, claim: Claim) -> None:
        """Gets the result of one request, or finds out that it has to wait."""
        try:
            outcome = await self._send(claim)
        except Exception:  # a bug of ours: it must not end the work on all other requests
            log.exception("the request %s of a batch failed inside", request_id(claim), extra={"event": "batch"})
            error = GPUMeshError("gpumesh failed inside; its log says more")
            outcome = self._conclude(claim, judge_error(error, claim.tries), error)
        if isinstance(outcome, Result):
            self._results.append(outcome)
        else:
            self._releases.append(outcome)
        self._has_output.set()

    async def _send(self, claim: Claim) -> Result | Release:
        """Sends one request once, unless that is of no use."""
        remaining_s = claim.expires_at - self._clock()
        if remaining_s <= 0.0:
            return make_expired_result(claim)
        if claim.lost >= MAX_LOST:
            message = f"gpumesh was killed {claim.lost} times while this request was under way"
            return make_error_result(claim, "failed", message)
        try:
            line = read_request_line(claim.endpoint, claim.content)
        except LineProblem as problem:  # the input file is not what it was
            return make_error_result(claim, problem.code, problem.message)
        request = BatchRequest(
            request_id(claim),
            claim.batch_id,
            claim.line,
            line.custom_id,
            claim.endpoint,
            claim.owner,
            line.body,
            claim.group,
            min(SEND_TIMEOUT_S, remaining_s),
        )
        try:
            reply = await self._sender.send(request)
        except BatchOwnerUnknown as error:
            self._pause(claim.batch_id, LEFT_S, f"it is left to other gateways, as {error}")
            return Release(claim)
        except GPUMeshError as error:
            again = judge_error(error, claim.tries, is_shared=self._store.is_shared)
            return self._conclude(claim, again, error)
        again = judge_reply(reply, claim.tries)
        return make_result(claim, reply) if again is None else self._put_back(claim, again, f"status {reply.status}")

    def _conclude(self, claim: Claim, again: TryAgain | None, error: GPUMeshError) -> Result | Release:
        """What becomes of a request without an answer."""
        if again is not None:
            return self._put_back(claim, again, error.message)
        return make_error_result(claim, error.code, error.message, node=error.node, attempts=claim.tries + 1)

    def _put_back(self, claim: Claim, again: TryAgain, reason: str) -> Release:
        """The release of a request that is sent again."""
        if again.counts:
            text = "the request of line %d of %s has failed, and is sent again in %.0f s: %s"
            log.info(text, claim.line, claim.batch_id, again.delay_s, reason, extra={"event": "batch"})
        else:
            self._pause(claim.batch_id, again.delay_s, reason)
        return Release(claim, again.delay_s, again.counts)

    # -- the store -----------------------------------------------------------------------------------------------

    async def _write_output(self) -> None:
        """Records results and releases claims, as they come. What comes while the store is busy is written together."""
        while True:
            await self._has_output.wait()
            self._has_output.clear()
            while self._results or self._releases:
                await self._patience.use_store(self._write_some)

    async def _write_some(self) -> None:
        """Writes some of what is to be written. Raises BatchStoreError, and then it is still to be written."""
        results, releases = self._results[:RESULTS_AT_A_TIME], self._releases[:RESULTS_AT_A_TIME]
        if results:
            await self._store.record(self.name, results)
            del self._results[: len(results)]
            self._reported -= {result.claim.batch_id for result in results}
            self._forget([result.claim for result in results])
        if releases:
            await self._store.release(self.name, releases)
            del self._releases[: len(releases)]
            self._forget([release.claim for release in releases])

    def _forget(self, claims: list[Claim]) -> None:
        for claim in claims:
            self._under_way.pop(claim.key, None)
        self._has_room.set()

    async def _renew_claims(self) -> None:
        """Renews the claims, and ends the requests that are not wanted any more."""
        while True:
            await asyncio.sleep(self._times.renew_s)
            claims = [work.claim for work in self._under_way.values()]
            if not claims:
                continue
            for key in await self._patience.use_store(
                partial(self._store.renew, self.name, claims, lease_s=self._times.lease_s)
            ):
                work = self._under_way.get(key)
                if work is not None and work.task is not None and not work.task.done():
                    work.is_unwanted = True
                    work.task.cancel()

    async def _watch_store(self) -> None:
        """Reads the input files of new batches, and does what only time brings."""
        next_settle_at = 0.0
        loop = asyncio.get_running_loop()
        while True:
            validating = partial(self._store.list_batches, statuses={BatchStatus.VALIDATING})
            for batch in reversed(await self._patience.use_store(validating)):
                try:
                    await self._patience.use_store(partial(validate_batch, self._store, batch.id))
                except BatchError as error:  # it was deleted meanwhile
                    log.info("the batch %s is not read: %s", batch.id, error, extra={"event": "batch"})
            self._has_news.set()
            if loop.time() >= next_settle_at:
                await self._patience.use_store(self._store.settle)
                next_settle_at = loop.time() + self._times.settle_s
            await self._store.wait_for_change(self._times.settle_s)

    async def _give_back(self) -> None:
        """Writes the results that are there, and releases all other claims. Raises BatchStoreError."""
        while self._results or self._releases:
            await self._write_some()
        releases = [Release(work.claim) for work in self._under_way.values()]
        self._under_way.clear()
        if releases:
            await self._store.release(self.name, releases)
