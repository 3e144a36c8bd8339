"""How a batch comes on: its rate, and the time that is left."""

from __future__ import annotations

from dataclasses import dataclass

from gpumesh.batches.base import BatchStore
from gpumesh.batches.reasons import BatchWait, SeenErrors
from gpumesh.batches.values import Batch, BatchStatus

# The rate is that of the shorter time, unless so few results came in it that it could be chance.
RATE_TIMES_S = (60.0, 600.0)
MIN_RESULTS = 20


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """A batch, and how fast it comes on. ``rate_per_s``: results per second of the last minutes; ``None`` if the batch
    is not worked on by its status. ``wait``: the older batch behind which it waits. ``errors``: what its failed
    requests have failed with. Both are ``None`` also where nobody has looked."""

    batch: Batch
    rate_per_s: float | None = None
    wait: BatchWait | None = None
    errors: SeenErrors | None = None

    @property
    def left_s(self) -> float | None:
        """The seconds until the last result, if the rate stays as it is; ``None`` if that is not known."""
        if not self.rate_per_s or self.batch.status is not BatchStatus.IN_PROGRESS:
            return None
        return self.batch.counts.unfinished / self.rate_per_s


async def measure_progress(store: BatchStore, batch: Batch, now: float) -> BatchProgress:
    """The batch with its rate. ``now``: seconds since 1970. Raises BatchError."""
    if batch.status is not BatchStatus.IN_PROGRESS:
        return BatchProgress(batch)
    age_s = max(now - (batch.in_progress_at or batch.created_at), 1.0)
    rate_per_s = 0.0
    for time_s in RATE_TIMES_S:
        count = await store.count_recent_results(batch.id, time_s)
        rate_per_s = count / min(time_s, age_s)
        if count >= MIN_RESULTS or age_s <= time_s:
            break
    return BatchProgress(batch, rate_per_s)
