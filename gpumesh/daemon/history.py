"""The last minute of a mesh, in a few numbers for each GPU and node: what sparklines are drawn from. Pure.

Kept by whoever watches: the background mesh for all who ask, `status --watch` for itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from gpumesh.state import MeshState

STEP_S = 5.0
STEPS = 12


@dataclass(frozen=True, slots=True)
class Series:
    """One value for each step, the oldest first; ``None`` where nothing was known."""

    key: str
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class History:
    """``gpus``: utilisation in % by UUID. ``nodes``: tokens/s by name. The last step is the one that still runs."""

    step_s: float = STEP_S
    gpus: tuple[Series, ...] = ()
    nodes: tuple[Series, ...] = ()

    def of_gpu(self, uuid: str) -> tuple[float | None, ...]:
        return next((series.values for series in self.gpus if series.key == uuid), ())


@dataclass(slots=True)
class _Step:
    """The values that were seen in one step, as sums and counts."""

    number: int
    gpus: dict[str, tuple[float, int]] = field(default_factory=dict)
    nodes: dict[str, tuple[float, int]] = field(default_factory=dict)


class Recorder:
    """Means of what it is shown, for the last ``STEPS`` steps. States are shown in the order of their time."""

    def __init__(self, earlier: History | None = None, *, at: datetime | None = None) -> None:
        """``earlier`` goes on from ``at``, when it was taken."""
        self._steps: deque[_Step] = deque(maxlen=STEPS)
        if earlier is not None and at is not None and earlier.step_s == STEP_S:
            self._seed(earlier, _number(at))

    def _seed(self, earlier: History, last: int) -> None:
        steps = {number: _Step(number) for number in range(last - STEPS + 1, last + 1)}
        for number, step in steps.items():
            place = number - last - 1
            for series, into in ((earlier.gpus, step.gpus), (earlier.nodes, step.nodes)):
                for each in series:
                    value = each.values[place] if len(each.values) >= -place else None
                    if value is not None:
                        into[each.key] = (value, 1)
        self._steps.extend(steps.values())

    def add(self, state: MeshState) -> None:
        number = _number(state.at)
        if not self._steps or self._steps[-1].number < number:
            self._steps.append(_Step(number))
        step = self._steps[-1]
        _count(step.nodes, ((node.name, node.backend.tokens_per_s) for node in state.nodes))
        _count(step.gpus, ((gpu.uuid, gpu.utilization_pct) for node in state.nodes for gpu in node.gpus or ()))

    def history(self) -> History:
        if not self._steps:
            return History()
        last = self._steps[-1].number
        steps = {step.number: step for step in self._steps}
        wanted = [steps.get(number) for number in range(last - STEPS + 1, last + 1)]
        return History(
            gpus=_series([None if step is None else step.gpus for step in wanted]),
            nodes=_series([None if step is None else step.nodes for step in wanted]),
        )


def _number(at: datetime) -> int:
    return math.floor(at.timestamp() / STEP_S)


def _count(into: dict[str, tuple[float, int]], seen: Iterable[tuple[str, float | None]]) -> None:
    for key, value in seen:
        if value is not None:
            total, count = into.get(key, (0.0, 0))
            into[key] = (total + value, count + 1)


def _series(steps: list[Mapping[str, tuple[float, int]] | None]) -> tuple[Series, ...]:
    keys = dict.fromkeys(key for step in steps if step is not None for key in step)

    def value(step: Mapping[str, tuple[float, int]] | None, key: str) -> float | None:
        if step is None or key not in step:
            return None
        total, count = step[key]
        return round(total / count, 1)

    return tuple(Series(key, tuple(value(step, key) for step in steps)) for key in keys)
