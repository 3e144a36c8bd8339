"""``UsageRecorder``: counts what each request has used, at its end, and writes the counts to the store at once.

The first request after a pause is written as soon as its reply is out. Under load the requests of some milliseconds are
written together: at most a hundredth of the time goes into commits. So a kill of the process costs at most these
milliseconds.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Protocol

from gpumesh.balancer.outcomes import RequestOutcome
from gpumesh.errors import GPUMeshError
from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.gateway.observe.exposition import Family, Labels, counter
from gpumesh.gateway.observe.record import RequestRecord
from gpumesh.gateway.usage.counts import NO_TOKENS, Tokens, UsageCounts, measure_tokens
from gpumesh.gateway.usage.report import Grouping, UsageReport, read_report
from gpumesh.gateway.usage.store import KEPT_DAYS, UsageKey, UsageStore
from gpumesh.text.printable import printable
from gpumesh.topology import KeySpec
from gpumesh.tunnels.blocking import run_in_thread

log = logging.getLogger(__name__)

# Between two commits. The longer one takes (a busy disk), the fewer there are.
MIN_SPACING_S = 0.005
MAX_SPACING_S = 0.1
SPACING_FACTOR = 150.0  # times the duration of the last commit
RETRY_S = 5.0  # after a commit that has failed
CHECKPOINT_INTERVAL_S = 10.0
CHECKPOINT_COMMITS = 300  # fewer commits since the last checkpoint (about 3 MiB) need none
DAY_S = 86400
MAX_NAME_CHARS = 200


class ModelLabeller(Protocol):
    """Returns the name under which a model is counted (``RequestMetrics.model_label``)."""

    def __call__(self, name: str | None, *, answered: bool) -> str: ...


class UsageRecorder:
    """Counts requests, and keeps the counts in ``store``; ``None``: in this process only.

    ``wall_clock`` returns seconds since 1970.
    """

    def __init__(
        self,
        store: UsageStore | None = None,
        *,
        find_label: ModelLabeller,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._find_label = find_label
        self._wall_clock = wall_clock
        self._pending: dict[UsageKey, UsageCounts] = {}
        self._totals: dict[str, UsageCounts] = {}  # since the start of this process, by key
        self._timer: asyncio.TimerHandle | None = None
        self._next_commit_at = 0.0  # by the loop's clock
        self._commits = 0  # since the last checkpoint
        self._is_failing = False  # whether the last commit has failed; the log says it once
        self._day = ""
        self._day_ends_at = 0.0
        if store is not None:
            self._remove_old_days(store)

    def __repr__(self) -> str:
        phase = "failing" if self._is_failing else "ok"
        return f"<UsageRecorder {self._store} {phase} {len(self._pending)} pending>"

    def add(self, record: RequestRecord, key: ClientKey | None) -> Tokens:
        """Counts a request that has ended, and returns its tokens. A request that no node has got, or that runs no
        model, is not counted. ``key``: the key of its client."""
        demand, node = record.demand, record.node
        if demand is None or node is None or not demand.needs_slot:
            return NO_TOKENS
        answer, outcome = record.answer, record.outcome
        tokens = measure_tokens(record)
        now = self._wall_clock()
        if now >= self._day_ends_at:
            self._begin_day(now)
        name = "" if key is None else key.usage_name
        model = self._find_label(demand.model, answered=answer is not None and answer.status < 400)
        last_node = node if answer is None else answer.node  # another one after a continuation
        counts = self._find_counts(name, model, last_node)
        counts.requests += 1
        counts.prompt_tokens += tokens.prompt
        counts.answer_tokens += tokens.answer
        if tokens.is_estimated:
            counts.estimated += 1
        if outcome is RequestOutcome.CANCELLED:
            counts.cancelled += 1
        elif outcome is not RequestOutcome.SERVED:
            counts.failed += 1
        for placed in record.progress.placed:  # one for each attempt, nearly always one
            if placed.ended:
                place = placed.account.name
                used = counts if place == last_node else self._find_counts(name, model, place)
                used.gpu_s += placed.gpu_s
                used.energy_j += placed.energy_j
        if self._timer is None and self._store is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(self._next_commit_at - loop.time(), 0.0), self.flush)
        return tokens

    def _find_counts(self, key: str, model: str, node: str) -> UsageCounts:
        """The counts of today that are not written yet."""
        row = UsageKey(self._day, key, model, node)
        counts = self._pending.get(row)
        if counts is None:
            counts = self._pending[row] = UsageCounts()
        return counts

    def _begin_day(self, now: float) -> None:
        days = int(now // DAY_S)
        self._day_ends_at = (days + 1) * DAY_S
        self._day = _format_day(now)

    # -- the store -----------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Writes the pending counts now. If that fails, they stay, and are tried again in some seconds."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        rows, self._pending = self._pending, {}
        if not rows:
            return
        if self._store is not None and not self._commit(self._store, rows):
            self._pending = rows
            return
        for row, counts in rows.items():
            self._totals.setdefault(row.key, UsageCounts()).add(counts)

    def _commit(self, store: UsageStore, rows: dict[UsageKey, UsageCounts]) -> bool:
        """Writes the rows, and plans when the next commit may be. Returns whether that was possible."""
        loop = asyncio.get_running_loop()
        began_at = time.perf_counter()
        try:
            store.add((_clean(row), counts) for row, counts in rows.items())
        except sqlite3.Error as error:
            if not self._is_failing:
                log.warning("usage cannot be written to %s: %s", store.path, error, extra={"event": "usage"})
            self._is_failing = True
            self._next_commit_at = loop.time() + RETRY_S
            self._timer = loop.call_later(RETRY_S, self.flush)
            return False
        self._is_failing = False
        self._commits += 1
        duration_s = time.perf_counter() - began_at
        self._next_commit_at = loop.time() + min(max(duration_s * SPACING_FACTOR, MIN_SPACING_S), MAX_SPACING_S)
        return True

    def _remove_old_days(self, store: UsageStore) -> None:
        first_day = datetime.fromtimestamp(self._wall_clock(), UTC) - timedelta(days=KEPT_DAYS)
        try:
            store.remove_before(f"{first_day:%Y-%m-%d}")
        except sqlite3.Error as error:
            log.warning("old usage cannot be removed from %s: %s", store.path, error, extra={"event": "usage"})

    def read_tokens(self, key: str, month: str) -> int:
        """The tokens that a key has used in a month (``2026-11``); those of this process if there is no store."""
        self.flush()
        if self._store is not None:
            try:
                return self._store.read_tokens(key, month)
            except sqlite3.Error as error:
                log.warning("usage cannot be read from %s: %s", self._store.path, error, extra={"event": "usage"})
        counts = self._totals.get(key, UsageCounts())
        return counts.prompt_tokens + counts.answer_tokens

    async def read_report(
        self, *, by: Sequence[Grouping], since: str, keys: Iterable[KeySpec], only_key: str | None, now: datetime
    ) -> UsageReport:
        """The report about all requests until now (``report.read_report``). It is empty without a store. Raises
        GPUMeshError if the store cannot be read."""
        self.flush()
        if self._store is None:
            return UsageReport(now, since, tuple(by), (), UsageCounts())
        read = partial(read_report, self._store.path, by=by, since=since, keys=tuple(keys), only_key=only_key, now=now)
        try:
            return await run_in_thread(read)
        except sqlite3.Error as error:
            raise GPUMeshError(f"usage cannot be read: {error}") from error

    async def run(self, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Keeps the file of commits short, until it is cancelled."""
        while self._store is not None:
            await sleep(CHECKPOINT_INTERVAL_S)
            if self._commits >= CHECKPOINT_COMMITS:
                self._commits = 0
                try:
                    await run_in_thread(self._store.checkpoint)
                except sqlite3.Error as error:  # the file grows, and the next checkpoint may do better
                    log.warning("no checkpoint of %s: %s", self._store.path, error, extra={"event": "usage"})

    def close(self) -> None:
        """Writes what is pending, and closes the store."""
        self.flush()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._store is not None:
            self._store.close()
            self._store = None

    # -- metrics -------------------------------------------------------------------------------------------------

    def families(self) -> Iterator[Family]:
        """The metrics of the keys since the start of this process. There are as many series as keys in mesh.yaml."""
        self.flush()

        def by_key(select: Callable[[UsageCounts], float]) -> Iterator[tuple[Labels, float]]:
            for key, counts in self._totals.items():
                if select(counts):
                    yield (("key", key),), select(counts)

        yield counter(
            "gpumesh_key_requests_total",
            "Requests to models that have ended, by the key of the client; without a key it is empty.",
            by_key(lambda counts: counts.requests),
        )
        yield counter(
            "gpumesh_key_prompt_tokens_total",
            "Tokens of prompts, by the key of the client.",
            by_key(lambda counts: counts.prompt_tokens),
        )
        yield counter(
            "gpumesh_key_output_tokens_total",
            "Tokens generated, by the key of the client.",
            by_key(lambda counts: counts.answer_tokens),
        )
        yield counter(
            "gpumesh_key_gpu_seconds_total",
            "Time of GPUs, shared evenly by the requests on a node, by the key of the client.",
            by_key(lambda counts: counts.gpu_s),
        )
        yield counter(
            "gpumesh_key_energy_joules_total",
            "Energy of GPUs, shared in the same way.",
            by_key(lambda counts: counts.energy_j),
        )


def _format_day(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d}"


def _clean(row: UsageKey) -> UsageKey:
    """The row with a model's name that SQLite can hold, and that a terminal may show: a server may list any name."""
    if row.model.isascii() and row.model.isprintable() and len(row.model) <= MAX_NAME_CHARS:
        return row
    return row._replace(model=printable(row.model, MAX_NAME_CHARS))
