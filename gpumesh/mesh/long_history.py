"""``LongHistory``: a day of a mesh in a few figures for each GPU and node, in steps of several lengths. Pure.

The gateway keeps one for the plots of its page. A short range has fine steps, a day has coarse ones. Each value takes
four bytes, and the number of series is bounded: a host that shows new GPUs each time must not fill the memory.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

from gpumesh.state import MeshState, NodeState

# The length of a step in seconds, and the number of steps: 15 minutes, 1 hour, 6 hours, 24 hours.
RESOLUTIONS = ((5, 180), (15, 240), (60, 360), (300, 288))
MAX_GPUS = 64  # of one node
VALUES_PER_TURN = 10_000  # that are read in one turn of the event loop, in about 2 ms
# Series of one resolution: with 1,068 steps in all, 4,000 series take 17 MB. A mesh of 16 nodes has about 100.
MAX_SERIES = 4000

SeriesKey = tuple[str, str]
"""The kind of figure, and the GPU (by UUID) or the node (by name) that it belongs to."""


@dataclass(frozen=True, slots=True)
class HistoryPart:
    """The values of all series from the step ``first`` on. Steps are counted since 1970 in steps of ``step_s`` seconds.
    The last step has not ended yet. ``began``: the step of the oldest value that is kept."""

    step_s: int
    began: int
    first: int
    last: int
    series: Mapping[str, Mapping[str, tuple[float | None, ...]]]


class LongHistory:
    """Records states and reports parts of the past. States must be added in the order of their times."""

    def __init__(self, resolutions: tuple[tuple[int, int], ...] = RESOLUTIONS, *, max_series: int = MAX_SERIES) -> None:
        self._tiers = [_Tier(step_s, steps, max_series) for step_s, steps in resolutions]

    def __repr__(self) -> str:
        return f"<LongHistory {', '.join(map(repr, self._tiers))}>"

    def add(self, state: MeshState, more: Mapping[str, float | None]) -> None:
        """Adds the figures of a state. ``more``: further figures of the whole mesh by name; ``None``: not known."""
        values = {key: value for key, value in _figures(state, more) if value is not None and math.isfinite(value)}
        for tier in self._tiers:
            tier.add(state.at, values)

    def part(self, range_s: float, after: int | None = None) -> Generator[None, None, HistoryPart]:
        """Returns the last ``range_s`` seconds, in the finest steps that reach so far back. ``after``: only the steps
        after the step of this number. The work of a large mesh takes long, so it is done in steps; states may be added
        between them."""
        tier = next((tier for tier in self._tiers if tier.step_s * tier.steps >= range_s), self._tiers[-1])
        return (yield from tier.part(math.ceil(range_s / tier.step_s), after))


def _figures(state: MeshState, more: Mapping[str, float | None]) -> Iterator[tuple[SeriesKey, float | None]]:
    """Yields the figures of a state. GPUs: utilisation in %, memory in use in MiB, power in W, temperature in °C.
    Nodes: tokens/s, requests in flight. The mesh: requests in flight and waiting, and ``more``."""
    for node in state.nodes:
        yield ("nodes", node.name), node.backend.tokens_per_s
        yield ("requests", node.name), node.load.in_flight
        yield from _gpu_figures(node)
    yield ("mesh", "in_flight"), state.gateway.in_flight
    yield ("mesh", "queued"), state.gateway.queued
    for name, value in more.items():
        yield ("mesh", name), value


def _gpu_figures(node: NodeState) -> Iterator[tuple[SeriesKey, float | None]]:
    for gpu in islice(node.gpus or (), MAX_GPUS):
        yield ("gpus", gpu.uuid), gpu.utilization_pct
        yield ("memory", gpu.uuid), gpu.memory_used_mib
        yield ("power", gpu.uuid), gpu.power_w
        yield ("temperature", gpu.uuid), gpu.temperature_c


class _Tier:
    """The last ``steps`` steps of ``step_s`` seconds. Each series is a ring: the value of a step is at the index step
    number modulo ``steps``, NaN if it is not known."""

    def __init__(self, step_s: int, steps: int, max_series: int) -> None:
        self.step_s = step_s
        self.steps = steps
        self._max_series = max_series
        self._rings: dict[SeriesKey, array[float]] = {}  # the series that was seen last is the last
        self._current: dict[SeriesKey, tuple[float, int]] = {}  # sum and number of the values in the last step
        self._first: int | None = None  # the number of the first step; ``None``: no state was added
        self._last = 0

    def __repr__(self) -> str:
        return f"{len(self._rings)} series of {self.steps} steps of {self.step_s} s"

    def add(self, at: datetime, values: Mapping[SeriesKey, float]) -> None:
        """Adds values to the step that contains this time."""
        number = math.floor(at.timestamp() / self.step_s)
        if self._first is None:
            self._first = self._last = number
        if number > self._last:
            self._begin_step(number)
        current = self._current
        for key, value in values.items():
            if key in current:
                total, count = current[key]
                current[key] = (total + value, count + 1)
            elif len(current) < self._max_series:
                current[key] = (value, 1)

    def _begin_step(self, number: int) -> None:
        """Stores the means of the last step, and clears the places of the steps that have passed since."""
        for key, (total, count) in self._current.items():
            ring = self._rings.pop(key, None)  # at the end again: it was seen last
            if ring is None:
                ring = array("f", [math.nan]) * self.steps
            ring[self._last % self.steps] = total / count
            self._rings[key] = ring
        self._current.clear()
        while len(self._rings) > self._max_series:
            del self._rings[next(iter(self._rings))]
        passed = range(max(self._last + 1, number - self.steps + 1), number + 1)
        for ring in self._rings.values():
            for step in passed:
                ring[step % self.steps] = math.nan
        self._last = number

    def part(self, count: int, after: int | None) -> Generator[None, None, HistoryPart]:
        """Returns the last ``count`` steps, without those up to ``after``."""
        last = self._last
        began = max(self._first or last, last - self.steps + 1)
        first = max(began, last - min(count, self.steps) + 1)
        if after is not None:
            first = min(max(first, after + 1), last)
        series: dict[str, dict[str, tuple[float | None, ...]]] = {}
        read_values = 0
        for kind, name in dict.fromkeys((*self._rings, *self._current)):
            values = self._values((kind, name), first, last)
            if any(value is not None for value in values):
                series.setdefault(kind, {})[name] = values
            read_values += len(values)
            if read_values > VALUES_PER_TURN:
                read_values = 0
                yield
        return HistoryPart(self.step_s, began, first, last, series)

    def _values(self, key: SeriesKey, first: int, last: int) -> tuple[float | None, ...]:
        """The values of a series from the step ``first`` to ``last``; of a step that has not ended the mean so far."""
        ring = self._rings.get(key)
        past: list[float | None] = [None] * (last + 1 - first)
        if ring is not None:
            stored = [ring[step % self.steps] for step in range(first, last + 1)]
            past = [None if value != value else round(value, 1) for value in stored]  # noqa: PLR0124 - only NaN differs
        if last == self._last:
            total, number = self._current.get(key, (0.0, 0))
            past[-1] = round(total / number, 1) if number else None
        return tuple(past)
