"""The recent past of a mesh: a few figures for each GPU and node, from which sparklines and plots are drawn. Pure.

The background mesh keeps the last minute for every command that asks, `status --watch` keeps its own, and the gateway
keeps the last hour for its page.
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
MAX_SERIES = 512  # of GPUs and nodes that are gone


@dataclass(frozen=True, slots=True)
class HistorySeries:
    """One value for each step, the oldest first; ``None`` where it was not known."""

    key: str
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class History:
    """``gpus``: utilisation in % by UUID. ``nodes``: tokens/s by name. ``memory``: MiB in use by UUID. ``mesh``:
    requests ``in_flight`` and ``queued``. The last step has not ended yet."""

    step_s: float = STEP_S
    gpus: tuple[HistorySeries, ...] = ()
    nodes: tuple[HistorySeries, ...] = ()
    memory: tuple[HistorySeries, ...] = ()
    mesh: tuple[HistorySeries, ...] = ()

    def gpu_utilization(self, uuid: str) -> tuple[float | None, ...]:
        return next((series.values for series in self.gpus if series.key == uuid), ())


_SumsByKey = dict[str, tuple[float, int]]
_KINDS = ("gpus", "nodes", "memory", "mesh")


@dataclass(slots=True)
class _Step:
    """Sums and counts of the values in one step, by kind and key. ``gpus``: the UUIDs that each node has shown."""

    number: int
    sums: dict[str, _SumsByKey] = field(default_factory=lambda: {kind: {} for kind in _KINDS})
    gpus: dict[str, set[str]] = field(default_factory=dict)

    def take_gpus(self, node: NodeState) -> Iterator[GpuState]:
        """The node's GPUs, at most ``MAX_GPUS`` different ones in a step: a host that shows other GPUs each time must
        not fill the memory."""
        uuids = self.gpus.setdefault(node.name, set())
        for gpu in node.gpus or ():
            if gpu.uuid in uuids or len(uuids) < MAX_GPUS:
                uuids.add(gpu.uuid)
                yield gpu


class Recorder:
    """Means over the states that were added, for the last ``steps`` steps. States are added in order of their time."""

    def __init__(
        self,
        earlier: History | None = None,
        *,
        at: datetime | None = None,
        step_s: float = STEP_S,
        steps: int = STEPS,
    ) -> None:
        """``earlier`` is a history that was taken at ``at``; this one continues it."""
        self._step_s = step_s
        self._steps: deque[_Step] = deque(maxlen=steps)
        if earlier is not None and at is not None and earlier.step_s == step_s:
            self._restore(earlier, self._step_number(at), steps)

    def _restore(self, earlier: History, last: int, count: int) -> None:
        steps = {number: _Step(number) for number in range(last - count + 1, last + 1)}
        for number, step in steps.items():
            index = number - last - 1
            for kind in _KINDS:
                for series in getattr(earlier, kind):
                    value = series.values[index] if len(series.values) >= -index else None
                    if value is not None:
                        step.sums[kind][series.key] = (value, 1)
        self._steps.extend(steps.values())

    def _step_number(self, at: datetime) -> int:
        return math.floor(at.timestamp() / self._step_s)

    def add(self, state: MeshState) -> None:
        number = self._step_number(state.at)
        if not self._steps or self._steps[-1].number < number:
            self._steps.append(_Step(number))
        step = self._steps[-1]
        sums = step.sums
        gpus = [gpu for node in state.nodes for gpu in step.take_gpus(node)]
        _add_values(sums["nodes"], ((node.name, node.backend.tokens_per_s) for node in state.nodes))
        _add_values(sums["gpus"], ((gpu.uuid, gpu.utilization_pct) for gpu in gpus))
        _add_values(sums["memory"], ((gpu.uuid, gpu.memory_used_mib) for gpu in gpus))
        _add_values(sums["mesh"], (("in_flight", state.gateway.in_flight), ("queued", state.gateway.queued)))

    def history(self) -> History:
        if not self._steps:
            return History(self._step_s)
        last = self._steps[-1].number
        steps = {step.number: step for step in self._steps}
        shown = [steps.get(number) for number in range(last - (self._steps.maxlen or 0) + 1, last + 1)]
        series = {kind: _build_series([None if step is None else step.sums[kind] for step in shown]) for kind in _KINDS}
        return History(self._step_s, **series)


def _add_values(sums: _SumsByKey, values: Iterable[tuple[str, float | None]]) -> None:
    for key, value in values:
        if value is not None:
            total, count = sums.get(key, (0.0, 0))
            sums[key] = (total + value, count + 1)


def _build_series(steps: list[_SumsByKey | None]) -> tuple[HistorySeries, ...]:
    # All keys of the last two steps; of older keys at most MAX_SERIES, the latest first.
    latest_first = [step for step in reversed(steps) if step is not None]
    current = dict.fromkeys(key for step in latest_first[:2] for key in step)
    older = (key for step in latest_first[2:] for key in step if key not in current)
    keys = current | dict.fromkeys(islice(older, MAX_SERIES))
    order = dict.fromkeys(key for step in steps if step is not None for key in step if key in keys)

    def mean(step: _SumsByKey | None, key: str) -> float | None:
        if step is None or key not in step:
            return None
        total, count = step[key]
        return round(total / count, 1)

    return tuple(HistorySeries(key, tuple(mean(step, key) for step in steps)) for key in order)
