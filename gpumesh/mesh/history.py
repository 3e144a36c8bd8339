"""A mesh's recent past, in a few numbers for each GPU and node: what sparklines and plots are drawn from. Pure.

Kept by whoever watches: the background mesh (the last minute) for all who ask, `status --watch` for itself, and the
gateway (the last hour) for its page.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice

from gpumesh.state import GpuState, MeshState, NodeState

STEP_S = 5.0
STEPS = 12
MAX_GPUS = 64  # of one node
MAX_SERIES = 512  # of GPUs that are gone, and others


@dataclass(frozen=True, slots=True)
class HistorySeries:
    """One value for each step, the oldest first; ``None`` where nothing was known."""

    key: str
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class History:
    """``gpus``: utilisation in % by UUID. ``nodes``: tokens/s by name. ``memory``: MiB in use by UUID. ``mesh``:
    requests ``in_flight`` and ``queued``. The last step is the one that still runs."""

    step_s: float = STEP_S
    gpus: tuple[HistorySeries, ...] = ()
    nodes: tuple[HistorySeries, ...] = ()
    memory: tuple[HistorySeries, ...] = ()
    mesh: tuple[HistorySeries, ...] = ()

    def gpu_utilization(self, uuid: str) -> tuple[float | None, ...]:
        return next((series.values for series in self.gpus if series.key == uuid), ())


_Values = dict[str, tuple[float, int]]
_KINDS = ("gpus", "nodes", "memory", "mesh")


@dataclass(slots=True)
class _Step:
    """The values that were seen in one step, by kind and key, as sums and counts."""

    number: int
    seen: dict[str, _Values] = field(default_factory=lambda: {kind: {} for kind in _KINDS})
    gpus: dict[str, set[str]] = field(default_factory=dict)
    """By node, the UUIDs that it showed in this step."""

    def known(self, node: NodeState) -> Iterator[GpuState]:
        """Its GPUs, as many different ones in a step as a host has: one that shows others each time fills no memory."""
        uuids = self.gpus.setdefault(node.name, set())
        for gpu in node.gpus or ():
            if gpu.uuid in uuids or len(uuids) < MAX_GPUS:
                uuids.add(gpu.uuid)
                yield gpu


class Recorder:
    """Means of what it is shown, for the last ``steps`` steps. States are shown in the order of their time."""

    def __init__(
        self,
        earlier: History | None = None,
        *,
        at: datetime | None = None,
        step_s: float = STEP_S,
        steps: int = STEPS,
    ) -> None:
        """``earlier`` goes on from ``at``, when it was taken."""
        self._step_s = step_s
        self._steps: deque[_Step] = deque(maxlen=steps)
        if earlier is not None and at is not None and earlier.step_s == step_s:
            self._seed(earlier, self._number(at), steps)

    def _seed(self, earlier: History, last: int, count: int) -> None:
        steps = {number: _Step(number) for number in range(last - count + 1, last + 1)}
        for number, step in steps.items():
            place = number - last - 1
            for kind in _KINDS:
                for each in getattr(earlier, kind):
                    value = each.values[place] if len(each.values) >= -place else None
                    if value is not None:
                        step.seen[kind][each.key] = (value, 1)
        self._steps.extend(steps.values())

    def _number(self, at: datetime) -> int:
        return math.floor(at.timestamp() / self._step_s)

    def add(self, state: MeshState) -> None:
        number = self._number(state.at)
        if not self._steps or self._steps[-1].number < number:
            self._steps.append(_Step(number))
        step = self._steps[-1]
        seen = step.seen
        gpus = [gpu for node in state.nodes for gpu in step.known(node)]
        _count(seen["nodes"], ((node.name, node.backend.tokens_per_s) for node in state.nodes))
        _count(seen["gpus"], ((gpu.uuid, gpu.utilization_pct) for gpu in gpus))
        _count(seen["memory"], ((gpu.uuid, gpu.memory_used_mib) for gpu in gpus))
        _count(seen["mesh"], (("in_flight", state.gateway.in_flight), ("queued", state.gateway.queued)))

    def history(self) -> History:
        if not self._steps:
            return History(self._step_s)
        last = self._steps[-1].number
        steps = {step.number: step for step in self._steps}
        wanted = [steps.get(number) for number in range(last - (self._steps.maxlen or 0) + 1, last + 1)]
        series = {kind: _series([None if step is None else step.seen[kind] for step in wanted]) for kind in _KINDS}
        return History(self._step_s, **series)


def _count(into: _Values, seen: Iterable[tuple[str, float | None]]) -> None:
    for key, value in seen:
        if value is not None:
            total, count = into.get(key, (0.0, 0))
            into[key] = (total + value, count + 1)


def _series(steps: list[_Values | None]) -> tuple[HistorySeries, ...]:
    # All that were there just now, and of what was there before as many as can be looked at, the latest first.
    there = [step for step in reversed(steps) if step is not None]
    now = dict.fromkeys(key for step in there[:2] for key in step)
    keys = now | dict.fromkeys(islice((key for step in there[2:] for key in step if key not in now), MAX_SERIES))
    order = dict.fromkeys(key for step in steps if step is not None for key in step if key in keys)

    def value(step: _Values | None, key: str) -> float | None:
        if step is None or key not in step:
            return None
        total, count = step[key]
        return round(total / count, 1)

    return tuple(HistorySeries(key, tuple(value(step, key) for step in steps)) for key in order)
