"""``UsageRecorder``: counts what each request has used, at its end, and writes the counts to the store at once.

The first request after a pause is written as soon as its reply is out. Under load the requests of ``SPACING_S`` are
written together. So a kill of the process costs at most the counts of this time.
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

from gpumesh.balancer.outcomes import RequestOutcome, request_outcome
from gpumesh.balancer.scheduling.scheduler import Placement
from gpumesh.errors import GPUMeshError
from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.gateway.observe.exposition import Family, Labels, counter
from gpumesh.gateway.observe.record import RequestRecord
from gpumesh.gateway.usage.counts import UsageCounts, measure_tokens
from gpumesh.gateway.usage.journal import UsageKey
from gpumesh.gateway.usage.report import Grouping, UsageReport, read_report
from gpumesh.gateway.usage.store import KEPT_DAYS, UsageStore
from gpumesh.mesh.requests.answer import Answer
from gpumesh.text.printable import printable
from gpumesh.topology import KeySpec
from gpumesh.tunnels.blocking import run_in_thread

log = logging.getLogger(__name__)

SPACING_S = 0.02  # between two lines of the journal: to write one takes 50 us of CPU on a busy machine
DAY_S = 86400.0
FOLD_INTERVAL_S = 1.0  # between two commits of the database
CHECKPOINT_FOLDS = 300  # commits between two checkpoints: about 3 MiB
MAX_NAME_CHARS = 200
# Stands for the key of prompts that came over the control socket: a name that no key of mesh.yaml can have.
COMMAND_LINE = ClientKey("run", "(run)")
_SERVED = RequestOutcome.SERVED  # to read a global is faster than to read a member

_GroupKey = tuple[str, str | None, bool, str]
"""The key's name, the model as the client has named it, whether a node has answered for it, and the node."""


class ModelLabeller(Protocol):
    """Returns the name under which a model is counted (``RequestMetrics.model_label``)."""

    def __call__(self, name: str | None, *, answered: bool) -> str: ...


class UsageRecorder:
    """Counts requests, and keeps the counts in ``store``; ``None``: in this process only. ``wall_clock`` returns
    seconds since 1970."""

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
        self._pending: dict[_GroupKey, UsageCounts] = {}  # what is not written yet
        self._totals: dict[str, UsageCounts] = {}  # since the start of this process, by key
        self._timer: asyncio.TimerHandle | None = None  # runs until the next ``flush``
        self._next_write_at = 0.0  # by the loop's clock
        self._is_failing = False  # whether the last write has failed; the log says it once
        self._day = ""  # in UTC
        self._day_ends_at = 0.0  # in seconds since 1970
        if store is not None:
            first_day = _format_day(wall_clock() - timedelta(days=KEPT_DAYS).total_seconds())
            self._report_failure(lambda: store.remove_before(first_day))

    def __repr__(self) -> str:
        phase = "failing" if self._is_failing else "ok"
        return f"<UsageRecorder {self._store} {phase} {len(self._pending)} pending>"

    def add(self, record: RequestRecord, key: ClientKey | None) -> None:
        """Counts a request that has ended. A request that no node has got, or that runs no model, is not counted.
        ``key``: the key of its client. It costs less than a microsecond."""
        demand, node, answer = record.demand, record.node, record.answer
        if node is None or demand is None or not demand.needs_slot:
            return
        is_answered = False
        if answer is not None:
            node = answer.node  # another one after a continuation
            is_answered = answer.status < 400
        group = ("" if key is None else key.usage_name, demand.model, is_answered, node)
        counts = self._pending.get(group)
        if counts is None:
            counts = self._begin_group(group)
        counts.requests += 1
        figures = answer.counters if answer is not None and is_answered else None
        if figures is not None and figures.prompt_tokens is not None and figures.tokens is not None:
            counts.prompt_tokens += figures.prompt_tokens  # ``measure_tokens``, written out for nearly all requests
            counts.answer_tokens += figures.tokens
        elif is_answered:
            tokens = measure_tokens(record)
            counts.prompt_tokens += tokens.prompt
            counts.answer_tokens += tokens.answer
            counts.estimated += tokens.is_estimated
        outcome = record.outcome
        if outcome is not _SERVED:
            counts.cancelled += outcome is RequestOutcome.CANCELLED
            counts.failed += outcome is RequestOutcome.FAILED
        progress = record.progress
        if progress.placement is not None:
            placed = progress.placement.placed
            if progress.earlier_placements or placed.account.name != node:
                self._add_attempts(group, (*progress.earlier_placements, progress.placement))
            elif placed.ended:
                counts.gpu_s += placed.gpu_s
                counts.energy_j += placed.energy_j

    def _add_attempts(self, group: _GroupKey, placements: Iterable[Placement]) -> None:
        """Counts what the attempts of one request have used, each for its node."""
        for placement in placements:
            placed = placement.placed
            if placed.ended:
                node_group = (*group[:3], placed.account.name)
                counts = self._pending.get(node_group) or self._begin_group(node_group)
                counts.gpu_s += placed.gpu_s
                counts.energy_j += placed.energy_j

    def _begin_group(self, group: _GroupKey) -> UsageCounts:
        """New counts for this group, which will be written soon."""
        counts = self._pending[group] = UsageCounts()
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(self._next_write_at - loop.time(), 0.0), self.flush)
        return counts

    def add_prompt(self, answer: Answer) -> None:
        """Counts a prompt of `gpumesh run` or `gpumesh chat`, which did not come through the gateway. ``answer`` has
        ended."""
        if answer.placement is not None and answer.outcome is not None:
            demand = answer.placement.placed.demand
            record = RequestRecord(self._wall_clock, 0.0, "", "", demand=demand, answer=answer, node=answer.node)
            record.outcome = request_outcome(answer.outcome)
            record.progress.placement = answer.placement
            self.add(record, COMMAND_LINE)

    # -- the store -----------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Writes the pending counts. If they cannot be written, they stay in memory, and are written with the next
        ``fold``."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._next_write_at = asyncio.get_running_loop().time() + SPACING_S
        if not self._pending:
            return
        groups, self._pending = self._pending, {}
        now = self._wall_clock()
        if not now < self._day_ends_at:
            self._day, self._day_ends_at = _format_day(now), (now // DAY_S + 1.0) * DAY_S
        day = self._day
        rows = []
        for (name, model, is_answered, node), counts in groups.items():
            label = _clean(self._find_label(model, answered=is_answered))
            rows.append((UsageKey(day, name, label, node), counts))
            total = self._totals.get(name)
            if total is None:
                total = self._totals[name] = UsageCounts()
            total.add(counts)
        store = self._store
        if store is not None:
            self._report_failure(lambda: store.append(rows))
            if store.has_long_journal:
                self._report_failure(store.fold)

    def _report_failure(self, work: Callable[[], object]) -> bool:
        """Does the work on the store. Returns whether it was possible. The log tells the first of several failures."""
        try:
            work()
        except (sqlite3.Error, OSError) as error:
            if not self._is_failing:
                path = "" if self._store is None else self._store.path
                log.warning("usage cannot be written to %s: %s", path, error, extra={"event": "usage"})
            self._is_failing = True
            return False
        self._is_failing = False
        return True

    async def run(self, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Moves the counts into the database, and keeps its files short, until it is cancelled."""
        store, folds = self._store, 0
        while store is not None:
            await sleep(FOLD_INTERVAL_S)
            self.flush()
            folds += self._report_failure(store.fold)
            if folds >= CHECKPOINT_FOLDS:
                folds = 0
                try:
                    await run_in_thread(store.checkpoint)
                except sqlite3.Error as error:  # the file grows, and the next checkpoint may do better
                    log.warning("no checkpoint of %s: %s", store.path, error, extra={"event": "usage"})

    def close(self) -> None:
        """Writes what is pending, and closes the store."""
        self.flush()
        if self._store is not None:
            self._report_failure(self._store.fold)
            self._store.close()
            self._store = None

    # -- what was used -------------------------------------------------------------------------------------------

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
        except (sqlite3.Error, OSError) as error:
            raise GPUMeshError(f"usage cannot be read: {error}") from error

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


def _clean(model: str) -> str:
    """The name in a form that SQLite can hold, and that a terminal may show: a server may list any name."""
    if model.isascii() and model.isprintable() and len(model) <= MAX_NAME_CHARS:
        return model
    return printable(model, MAX_NAME_CHARS)
