"""Finds nodes that have become much slower than they were and than the other nodes are. Pure.

A slow node is not switched off: its forecast is multiplied by a factor, and an occasional request is sent there as a
probe, so that its recovery is seen. ``OutlierWatch`` first compares a node with its own past, and then with the other
nodes. If the other nodes have become slower too, the work has changed (longer prompts, more streams), and not the node.

All slownesses are ratios: 1.0 is as usual, 2.0 takes twice as long. They are averaged as logarithms, so that half the
speed and twice the speed cancel out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from statistics import median

SLOW_FROM = 2.0  # a node that is this many times slower than usual becomes slow …
NORMAL_BELOW = 1.4  # … and is normal again only below this: so it does not change its state with each answer
MAX_FACTOR = 8.0  # by which a forecast is multiplied at most

MIN_PAST = 16  # with fewer answers, the usual speed is not known
RECENT_ANSWERS = 9  # the median of this number of last answers is the present speed
MIN_RECENT = 5  # with fewer recent answers, a node does not become slow
PROBE_ANSWERS = 3  # instead of RECENT_ANSWERS while the node is slow, because it gets few requests then
RECENT_S = 600.0  # an older answer is not recent
FORGET_SLOW_S = 3600.0  # a slow node without any answer for this time is taken for normal
# After the first ``MIN_PAST`` answers, the usual speed moves towards each answer by the share PAST_WEIGHT. An answer
# that deviates by more than MAX_DEVIATION, a factor of 1.4, counts as an answer at this distance. So it takes about 50
# answers at half the usual speed, or 250 at an eighth, until this speed counts as usual.
PAST_WEIGHT = 0.02
MAX_DEVIATION = 0.5  # as a power of two: 2 ** 0.5 = 1.4

PROBE_EVERY = 20  # a slow node gets at least each 20th of the requests that it could serve
IDLE_PROBE_S = 10.0  # a slow node with nothing in flight gets a request if its last one was longer ago than this

MAX_MODELS = 64  # of one node; with more, the model whose usual speed is known longest is forgotten
MAX_PEERS = 64  # if there are more other nodes, only so many are looked at: their median is as good
_LEAST, _GREATEST = 1e-6, 1e9  # bounds of a time in seconds and of a rate in tokens/s; figures outside are ignored


@dataclass(frozen=True, slots=True)
class Slowness:
    """How slow a slow node is. ``factor`` (1 to 8) multiplies its forecast. ``first_token`` and ``decode``: how many
    times slower than usual the first token comes and the tokens follow; ``None`` without recent answers."""

    factor: float
    first_token: float | None = None
    decode: float | None = None


@dataclass(slots=True)
class _Usual:
    """The usual value of a quantity, as a logarithm to the base 2. ``value`` begins as the median of the first
    ``MIN_PAST`` values, and then follows the newer values slowly. It is ``None`` before."""

    value: float | None = None
    first_values: list[float] = field(default_factory=list)

    def add(self, value: float) -> float | None:
        """Adds a value. Returns the value minus the usual value as it was before; ``None`` if the usual value was not
        known yet."""
        if self.value is None:
            self.first_values.append(value)
            if len(self.first_values) == MIN_PAST:
                self.value = median(self.first_values)
                self.first_values.clear()
            return None
        deviation = value - self.value
        self.value += PAST_WEIGHT * min(max(deviation, -MAX_DEVIATION), MAX_DEVIATION)
        return deviation


class _Recent:
    """The last deviations from the usual value, as logarithms to the base 2; positive deviations are slower."""

    def __init__(self) -> None:
        self._entries: deque[tuple[float, float]] = deque(maxlen=RECENT_ANSWERS)  # time in seconds, deviation
        # The cache of ``slowness``: its argument ``of_slow_node``, the time until which the result holds, and the
        # result.
        self._cached: tuple[bool, float, float | None] = (False, -math.inf, None)

    def add(self, now: float, deviation: float) -> None:
        """Adds the deviation of an answer."""
        self._entries.append((now, deviation))
        self._cached = (False, -math.inf, None)

    def slowness(self, now: float, *, of_slow_node: bool) -> float | None:
        """The median of the recent deviations as a ratio; ``None`` if there are too few. For a slow node, only the last
        ``PROBE_ANSWERS`` answers count, and one answer is enough."""
        was_of_slow_node, valid_until, slowness = self._cached
        if was_of_slow_node != of_slow_node or now > valid_until:
            recent = list(self._entries)
            if recent and now - recent[0][0] > RECENT_S:
                recent = [entry for entry in recent if now - entry[0] <= RECENT_S]
            slowness = self._find_median(recent, of_slow_node=of_slow_node)
            valid_until = recent[0][0] + RECENT_S if recent else math.inf  # after this, the oldest does not count
            self._cached = (of_slow_node, valid_until, slowness)
        return slowness

    @staticmethod
    def _find_median(entries: Sequence[tuple[float, float]], *, of_slow_node: bool) -> float | None:
        """Does the work of ``slowness``, without its cache, for these recent entries."""
        least_count = MIN_RECENT
        if of_slow_node:
            entries = entries[-PROBE_ANSWERS:]
            least_count = 1
        if len(entries) < least_count:
            return None
        # Each answer asks for this median. ``statistics.median`` takes twice the time.
        deviations = sorted([deviation for _, deviation in entries])
        middle = len(deviations) // 2
        if len(deviations) % 2:
            return float(2.0 ** deviations[middle])
        return float(2.0 ** ((deviations[middle - 1] + deviations[middle]) / 2))


@dataclass(slots=True)
class _Track:
    """What is known of one node's speed. ``slow`` is ``None`` while the node is normal. ``slowness`` is the ratio as it
    was after the last answer, which ended at ``last_answer_at``. ``passed_over`` counts the requests that went to other
    nodes since this node's last request, at ``last_request_at``; both matter only while the node is slow."""

    first_token: _Usual = field(default_factory=_Usual)
    decode: dict[str, _Usual] = field(default_factory=dict)  # by model
    recent_first_token: _Recent = field(default_factory=_Recent)
    recent_decode: _Recent = field(default_factory=_Recent)
    slowness: float = 1.0
    last_answer_at: float = -math.inf
    slow: Slowness | None = None
    passed_over: int = 0
    last_request_at: float = -math.inf


class OutlierWatch:
    """Watches the speed of all nodes, by name. All times are seconds of the caller's monotonic clock."""

    def __init__(self) -> None:
        self._tracks: dict[str, _Track] = {}  # by the name of the node
        self._slow_nodes: set[str] = set()

    def __repr__(self) -> str:
        return f"<OutlierWatch {len(self._tracks)} nodes, slow: {', '.join(sorted(self._slow_nodes)) or 'none'}>"

    # -- what was measured ---------------------------------------------------------------------------------------

    def add_first_token(self, node: str, measured_s: float, forecast_s: float, now: float) -> None:
        """Adds the time to the first token of one answer, and what was forecast for it. The forecast must not contain
        the factor of this watch. Otherwise a slow node would look normal."""
        if not (_is_plausible(measured_s) and _is_plausible(forecast_s)):
            return
        track = self._track_of(node)
        deviation = track.first_token.add(math.log2(measured_s / forecast_s))
        if deviation is not None:
            track.recent_first_token.add(now, deviation)
        self._update_verdict(node, track, now)

    def add_decode_rate(self, node: str, model: str, tokens_per_s: float, now: float) -> None:
        """Adds the rate of one answer: the rate that the answer would have had alone on the node. (The rate as measured
        falls with each concurrent stream, so it would make a busy node look slow.)"""
        if not _is_plausible(tokens_per_s):
            return
        track = self._track_of(node)
        usual = track.decode.get(model)
        if usual is None:
            if len(track.decode) >= MAX_MODELS:
                del track.decode[next(iter(track.decode))]  # the model that was added first
            usual = track.decode[model] = _Usual()
        deviation = usual.add(-math.log2(tokens_per_s))  # negative: a low rate is slow
        if deviation is not None:
            track.recent_decode.add(now, deviation)
        self._update_verdict(node, track, now)

    def _track_of(self, node: str) -> _Track:
        track = self._tracks.get(node)
        if track is None:
            track = self._tracks[node] = _Track()
        return track

    def forget(self, node: str) -> None:
        """Forgets a node, because its server or its connection is new."""
        self._tracks.pop(node, None)
        self._slow_nodes.discard(node)

    def _update_verdict(self, node: str, track: _Track, now: float) -> None:
        """Decides after an answer whether the node is slow."""
        track.last_answer_at = now
        was_slow = track.slow is not None
        first_token = track.recent_first_token.slowness(now, of_slow_node=was_slow)
        decode = track.recent_decode.slowness(now, of_slow_node=was_slow)
        if first_token is None and decode is None:
            return  # there are too few recent answers, so the node stays as it was: slow or normal
        track.slowness = max(first_token or 1.0, decode or 1.0)
        relative = track.slowness
        if relative >= NORMAL_BELOW:  # below, the node is normal in any case
            relative /= max(self._peer_slowness(node, now), 1.0)
        is_slow = relative >= (NORMAL_BELOW if was_slow else SLOW_FROM)
        if is_slow:
            track.slow = Slowness(min(relative, MAX_FACTOR), first_token, decode)
            self._slow_nodes.add(node)
        else:
            track.slow = None
            self._slow_nodes.discard(node)
        if is_slow and not was_slow:
            track.passed_over, track.last_request_at = 0, now

    def _peer_slowness(self, node: str, now: float) -> float:
        """The median slowness of the other nodes that have answered lately; 1.0 if there is none."""
        slownesses: list[float] = []
        for name, track in self._tracks.items():
            if name != node and now - track.last_answer_at <= RECENT_S:
                slownesses.append(track.slowness)
                if len(slownesses) == MAX_PEERS:
                    break
        return median(slownesses) if slownesses else 1.0

    # -- verdicts ------------------------------------------------------------------------------------------------

    def slowness(self, node: str, now: float) -> Slowness | None:
        """How slow the node is; ``None`` if it is normal, or if nothing is known."""
        track = self._tracks.get(node)
        if track is None or track.slow is None or now - track.last_answer_at > FORGET_SLOW_S:
            return None
        return track.slow

    def usual_token_s(self, node: str) -> Mapping[str, float]:
        """The node's usual seconds for one token, by model, where they are known."""
        track = self._tracks.get(node)
        if track is None:
            return {}
        return {model: 2.0**usual.value for model, usual in track.decode.items() if usual.value is not None}

    def factors(self, servable: AbstractSet[str], now: float) -> Mapping[str, float]:
        """The factors (above 1, up to ``MAX_FACTOR``) by which the forecasts of slow nodes are multiplied, by node. A
        node that is left out has the factor 1. ``servable``: the names of the nodes that could serve the request. At
        most half of these nodes count as slow, the slowest first: if most nodes are slow, this is the usual speed."""
        if not self._slow_nodes:  # the usual case; this is asked for each request
            return {}
        factors: dict[str, float] = {}
        for node in self._slow_nodes:  # few nodes, while ``servable`` may hold many
            slowness = self.slowness(node, now) if node in servable else None
            if slowness is not None:
                factors[node] = slowness.factor
        max_count = len(servable) // 2
        slowest_first = sorted(factors, key=lambda node: (-factors[node], node))
        return {node: factors[node] for node in slowest_first[:max_count]}

    # -- probes --------------------------------------------------------------------------------------------------

    def wants_probe(self, node: str, now: float, *, in_flight: int) -> bool:
        """Whether the next request that this slow node could serve should go there, to see whether it has recovered.
        ``in_flight``: the number of requests in flight on the node; if there is one, its answer will show it."""
        track = self._tracks.get(node)
        if track is None or track.slow is None or in_flight > 0:
            return False
        was_often_passed_over = track.passed_over >= PROBE_EVERY - 1
        has_long_been_idle = now - track.last_request_at >= IDLE_PROBE_S
        return was_often_passed_over or has_long_been_idle

    def record_choice(self, chosen: str, servable: AbstractSet[str], now: float) -> None:
        """Notes that ``chosen`` was given a request which the nodes in ``servable`` could serve."""
        for node in self._slow_nodes:  # most often empty
            if node not in servable:
                continue
            track = self._tracks[node]
            if node == chosen:
                track.passed_over, track.last_request_at = 0, now
            else:
                track.passed_over += 1


def _is_plausible(value: float) -> bool:
    """Whether a time or rate can be used. False for NaN, infinity, zero and negative numbers too."""
    return _LEAST <= value <= _GREATEST
