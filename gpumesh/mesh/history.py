"""Records the recent past of a mesh: a few figures for each GPU and node, for sparklines and plots. Pure.

The background mesh keeps the last minute for commands. `status --watch` keeps a history of its own. The gateway keeps
the last hour for its page.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain

from gpumesh.state import GpuState, MeshState, NodeState

STEP_S = 5.0
STEPS = 12  # one minute in all
MAX_GPUS = 64  # of one node
MAX_OLD_SERIES = 512  # series of GPUs and nodes that are no longer in the mesh


@dataclass(frozen=True, slots=True)
class HistorySeries:
    """The values of one figure, one for each step, the oldest first. A value that was not known is ``None``."""

    key: str
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class History:
    """The recent figures of a mesh, as means over steps of ``step_s`` seconds. The last step has not ended yet.

    ``gpus``: utilisation in % by UUID. ``nodes``: tokens/s by name. ``memory``: MiB in use by UUID. ``mesh``: requests
    ``in_flight`` and ``queued``."""

    step_s: float = STEP_S
    gpus: tuple[HistorySeries, ...] = ()
    nodes: tuple[HistorySeries, ...] = ()
    memory: tuple[HistorySeries, ...] = ()
    mesh: tuple[HistorySeries, ...] = ()

    def gpu_utilization(self, uuid: str) -> tuple[float | None, ...]:
        """The utilisation of one GPU in %, one value for each step; empty for a GPU that was not seen."""
        return next((series.values for series in self.gpus if series.key == uuid), ())


_SumsByKey = dict[str, tuple[float, int]]
"""The sum of the values and their number, by the key of a series."""
_KINDS = ("gpus", "nodes", "memory", "mesh")  # the fields of History that hold series


@dataclass(slots=True)
class _Step:
    """The sums of the values in one step. ``number`` counts the steps since 1970. ``sums`` are by kind of series.
    ``gpu_uuids``: the UUIDs that each node has shown in this step."""

    number: int
    sums: dict[str, _SumsByKey] = field(default_factory=lambda: {kind: {} for kind in _KINDS})
    gpu_uuids: dict[str, set[str]] = field(default_factory=dict)

    def take_gpus(self, node: NodeState) -> Iterator[GpuState]:
        """Yields the node's GPUs, at most ``MAX_GPUS`` different GPUs in one step: a host that shows new GPUs each time
        must not fill the memory."""
        uuids = self.gpu_uuids.setdefault(node.name, set())
        for gpu in node.gpus or ():
            if gpu.uuid in uuids or len(uuids) < MAX_GPUS:
                uuids.add(gpu.uuid)
                yield gpu


class Recorder:
    """Computes the means over the added states, for each of the last ``steps`` steps of ``step_s`` seconds. States must
    be added in the order of their times."""

    def __init__(
        self,
        earlier: History | None = None,
        *,
        at: datetime | None = None,
        step_s: float = STEP_S,
        steps: int = STEPS,
    ) -> None:
        """Continues the history ``earlier``, which was taken at the time ``at``, if both are given. A history with
        steps of another length cannot be continued and is dropped."""
        self._step_s = step_s
        self._steps: deque[_Step] = deque(maxlen=steps)
        if earlier is not None and at is not None and earlier.step_s == step_s:
            self._restore(earlier, self._step_number(at), steps)

    def _restore(self, earlier: History, last_number: int, count: int) -> None:
        """Adds ``count`` steps with the values of ``earlier``, whose last step has the number ``last_number``."""
        for age in reversed(range(count)):  # the last step has the age 0
            step = _Step(last_number - age)
            for kind in _KINDS:
                for series in getattr(earlier, kind):
                    value = series.values[-1 - age] if age < len(series.values) else None
                    if value is not None:
                        step.sums[kind][series.key] = (value, 1)  # the old mean counts as one value
            self._steps.append(step)

    def _step_number(self, at: datetime) -> int:
        """The number of the step that contains this time."""
        return math.floor(at.timestamp() / self._step_s)

    def add(self, state: MeshState) -> None:
        """Adds the figures of a state to the step that contains its time."""
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
        """The recorded history, whose last step is the step of the last added state."""
        if not self._steps:
            return History(self._step_s)
        last_number = self._steps[-1].number
        first_number = last_number - (self._steps.maxlen or 0) + 1  # maxlen is set; ``or 0`` is for the type checker
        steps_by_number = {step.number: step for step in self._steps}
        steps = [steps_by_number.get(number) for number in range(first_number, last_number + 1)]
        series = {}
        for kind in _KINDS:
            # None for a step in which no state was added.
            series[kind] = _build_series([None if step is None else step.sums[kind] for step in steps])
        return History(self._step_s, **series)


def _add_values(sums: _SumsByKey, values: Iterable[tuple[str, float | None]]) -> None:
    """Adds values by key to ``sums``; a value of ``None`` is not known and is left out."""
    for key, value in values:
        if value is not None:
            total, count = sums.get(key, (0.0, 0))
            sums[key] = (total + value, count + 1)


def _build_series(steps: list[_SumsByKey | None]) -> tuple[HistorySeries, ...]:
    """Builds one series for each key, in the order in which the keys came up. All keys of the last two steps get a
    series: they are in the mesh now, and the last step may have only begun. Among the older keys, only the
    ``MAX_OLD_SERIES`` keys that were seen last get a series."""
    filled_steps = [step for step in steps if step is not None]
    keys_latest_first = dict.fromkeys(chain(*reversed(filled_steps)))
    current_keys = set(chain(*filled_steps[-2:]))
    old_keys = [key for key in keys_latest_first if key not in current_keys]
    chosen_keys = current_keys.union(old_keys[:MAX_OLD_SERIES])
    ordered_keys = [key for key in dict.fromkeys(chain(*filled_steps)) if key in chosen_keys]

    def compute_mean(step: _SumsByKey | None, key: str) -> float | None:
        if step is None or key not in step:
            return None
        total, count = step[key]
        return round(total / count, 1)

    return tuple(HistorySeries(key, tuple(compute_mean(step, key) for step in steps)) for key in ordered_keys)
