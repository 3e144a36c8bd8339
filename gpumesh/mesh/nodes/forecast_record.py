"""``ForecastRecord``: the forecasts for the requests of one node beside the times that they have taken. Pure.

The scheduler decides by forecasts, so people must be able to see how good they are, and how much time loads take. The
record costs about a microsecond a request; texts are made only when they are needed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import PlacedRequest
from gpumesh.balancer.base import ResidencyKey
from gpumesh.balancer.forecast import Forecast
from gpumesh.balancer.scheduling.explanation import describe_forecast
from gpumesh.balancer.scheduling.scheduler import Placement

RECENT_REQUESTS = 3  # the latest requests that people see
LOADING_WINDOW_S = 300.0  # loads that began longer ago do not count as recent
MAX_LOAD_EVENTS = 256  # the latest loads that are remembered
# At most this number of models are counted by name, all others together as OTHER_MODELS: the names become labels of
# metrics.
MAX_MODELS = 64
OTHER_MODELS = "other"
LEAST_LOAD_MS = 200.0  # a server reports some milliseconds of load for a model in memory too
MAX_CACHED_TOKENS = 1 << 27  # of one prompt: a server may report any figure
# Upper bounds of the buckets of actual time / forecast time.
RATIO_BOUNDS = (0.25, 0.5, 0.75, 0.9, 1.1, 1.5, 2.0, 4.0)


class AnsweredRequest(msgspec.Struct, gc=False):
    """A request that was answered to its end: the forecast for it, and the seconds that it has taken (``actual_s``)."""

    forecast: Forecast
    key: ResidencyKey | None
    prompt_tokens: float
    actual_s: float
    ended_at: float
    _explanation: str | None = None

    def explain(self) -> str:
        """The parts of the forecast as a text. It is made when it is needed first, because most requests are never
        shown."""
        if self._explanation is None:
            self._explanation = describe_forecast(self.forecast, self.key, self.prompt_tokens)
        return self._explanation


@dataclass(slots=True, eq=False)
class LoadEvent:
    """A load that a request has caused. It is expected to take ``expected_s`` seconds, and has taken ``seconds``;
    ``None`` while it runs."""

    key: ResidencyKey
    began_at: float
    expected_s: float
    seconds: float | None = None

    def seconds_until(self, now: float) -> float:
        """The seconds that the load has lasted until now. A load without a reported end may have ended already, so it
        counts for at most the expected time."""
        if self.seconds is not None:
            return self.seconds
        return min(max(now - self.began_at, 0.0), self.expected_s)


class RatioCounts:
    """How often the ratio of actual time to forecast time has fallen into each bucket of ``RATIO_BOUNDS`` (the last
    bucket: above all bounds), and the sum of the ratios."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(RATIO_BOUNDS) + 1)
        self.sum = 0.0


class ForecastRecord:
    """The record of one node. Each sent request is noted when it is placed (``note_placed``), and once when it ends.

    ``forecast_s`` and ``actual_s`` are sums over the requests that were answered to their end. ``cached_tokens`` of
    their prompts were believed to be in the server's cache; ``reported_cached_tokens`` were there by the figures of the
    servers that report them. ``loads`` counts for each model (full name) how often requests of this gateway have made
    the server load it, ``pushed_out`` how often these loads have made the server unload it. ``load_s`` is the time that
    the loads have taken.
    """

    def __init__(self) -> None:
        self.forecast_s = 0.0
        self.actual_s = 0.0
        self.ratios = RatioCounts()
        self.cached_tokens = 0.0
        self.reported_cached_tokens = 0
        self.loads: dict[str, int] = {}
        self.pushed_out: dict[str, int] = {}
        self.load_s = 0.0
        self.recent: deque[AnsweredRequest] = deque(maxlen=RECENT_REQUESTS)
        self._load_events: deque[LoadEvent] = deque(maxlen=MAX_LOAD_EVENTS)
        self._running_loads: dict[PlacedRequest, LoadEvent] = {}  # the event of each load that has not ended

    def __repr__(self) -> str:
        return f"<ForecastRecord {self.forecast_s:.1f} s forecast, {self.actual_s:.1f} s taken, {self.loads} loaded>"

    # -- what happens --------------------------------------------------------------------------------------------

    def note_placed(self, placement: Placement) -> None:
        """Notes that the request is about to be sent."""
        placed = placement.placed
        if placed.drain_s is not None and placed.key is not None:  # this request makes the server load its model
            event = LoadEvent(placed.key, placed.sent_at, placement.forecast.load_s)
            self._running_loads[placed] = event
            self._load_events.append(event)

    def note_discarded(self, placement: Placement) -> None:
        """Notes that the request was not sent after all."""
        event = self._running_loads.pop(placement.placed, None)
        if event is not None and event in self._load_events:
            self._load_events.remove(event)

    def note_end(self, placement: Placement, now: float, counters: ServerCounters | None, *, is_answered: bool) -> None:
        """Notes that the request has ended. ``is_answered``: with a whole answer. ``counters`` are the server's figures
        for the answer; ``None`` if there are none."""
        placed, forecast = placement.placed, placement.forecast
        if placed.drain_s is not None:  # this request made the server load its model
            self._end_load(placement, now, counters)
        elif counters is not None and not placed.needs_load and (counters.load_ms or 0.0) >= LEAST_LOAD_MS:
            self._note_unexpected_load(placed, now, counters.load_ms or 0.0)
        if not is_answered:
            return
        actual_s, forecast_s = now - placed.sent_at, forecast.own_s
        self.forecast_s += forecast_s
        self.actual_s += actual_s
        if forecast_s > 0.0:
            ratio = actual_s / forecast_s
            self.ratios.counts[bisect_left(RATIO_BOUNDS, ratio)] += 1
            self.ratios.sum += ratio
        if placed.cached_tokens:
            self.cached_tokens += placed.cached_tokens
        if counters is not None and counters.cached_tokens is not None:
            self.reported_cached_tokens += min(max(counters.cached_tokens, 0), MAX_CACHED_TOKENS)
        self.recent.append(AnsweredRequest(forecast, placed.key, placed.work.prompt_tokens, actual_s, now))

    def _end_load(self, placement: Placement, now: float, counters: ServerCounters | None) -> None:
        """Counts the load that this request has caused. Its time is the server's own figure, without the wait until
        other models could be unloaded. If the server gives none, it is the expected time, or the time until now if that
        is shorter."""
        placed = placement.placed
        event = self._running_loads.pop(placed, None)
        if event is None:
            return
        event.seconds = event.seconds_until(now)
        if counters is not None and counters.load_ms is not None and math.isfinite(counters.load_ms):
            reported_s = counters.load_ms / 1000.0 - (placed.drain_s or 0.0)
            # Bounded by the time that has passed, because a server may report any figure.
            event.seconds = min(max(reported_s, 0.0), max(now - event.began_at, 0.0))
        self._count_load(event)
        for model in placement.forecast.pushed_out:
            _count(self.pushed_out, model)

    def _note_unexpected_load(self, placed: PlacedRequest, now: float, load_ms: float) -> None:
        """Counts a load of a model that was believed to be in memory: another program, or a limit of the server that is
        not known here, has pushed the model out. If several requests have waited for one load, it is counted once."""
        is_load = LEAST_LOAD_MS <= load_ms < math.inf  # false for NaN
        if placed.key is None or not is_load:
            return
        seconds = min(load_ms / 1000.0, max(now - placed.sent_at, 0.0))
        for known in reversed(self._load_events):
            # If a load of the same model began so recently, this request has waited for that load.
            if known.key == placed.key and known.began_at >= placed.sent_at - seconds:
                return
        event = LoadEvent(placed.key, placed.sent_at, seconds, seconds)
        self._load_events.append(event)
        self._count_load(event)

    def _count_load(self, event: LoadEvent) -> None:
        """Adds a load that has ended to the sums."""
        self.load_s += event.seconds or 0.0
        _count(self.loads, event.key.model)

    # -- what has happened ---------------------------------------------------------------------------------------

    def recent_loads(self, now: float) -> Iterator[LoadEvent]:
        """The loads that have begun in the last ``LOADING_WINDOW_S``."""
        return (event for event in self._load_events if now - event.began_at <= LOADING_WINDOW_S)


def _count(counts: dict[str, int], model: str) -> None:
    """Counts the model under its name, or as one of the other models if too many names are counted already."""
    if model not in counts and len(counts) >= MAX_MODELS:
        model = OTHER_MODELS
    counts[model] = counts.get(model, 0) + 1
