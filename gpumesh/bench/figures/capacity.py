"""What a node can do at once: the points of its ramp, and the capacity that follows from them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.figures.summary import StageResult

# The least share of the highest rate at which a level counts as the capacity. Rates of short stages differ by some %.
FULL_RATE_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class RampPoint:
    """A level of a ramp: ``level`` requests were in flight, and of their answers ``at_once`` came at the same time.

    ``waited_inside`` is the number of requests that waited inside the server (``None``: the server does not tell).
    ``is_direct``: the requests went to the server without the mesh, and so without the mesh's own limit.
    ``answers_per_s`` stands for the tokens/s of a server that does not count its tokens.
    """

    level: int
    at_once: int
    tokens_per_s: float | None
    ttft_p50_ms: float | None = None
    waited_inside: int | None = None
    is_direct: bool = False
    answers_per_s: float | None = None

    @property
    def running(self) -> int:
        """How many of the requests in flight the server really ran at once; all of them if nothing shows it."""
        return min(self.level, self.at_once) if self.at_once else self.level


@dataclass(frozen=True, slots=True)
class NodeCapacity:
    """How many requests at once let a node give its most tokens/s: ``parallel``, and ``tokens_per_s`` at that number.

    ``reason`` is a sentence that says what limits it. ``server_parallel`` is given if the server itself runs more
    requests at once than the mesh sends to it. ``ramp`` has what was measured.
    """

    node: str
    parallel: int
    tokens_per_s: float | None
    reason: str
    ramp: tuple[RampPoint, ...] = ()
    server_parallel: int | None = None


def ramp_point(result: StageResult, level: int, *, is_direct: bool = False) -> RampPoint:
    """The point of a stage with ``level`` requests in flight on one node."""
    share = next(iter(result.nodes), None)
    return RampPoint(
        level,
        at_once=0 if share is None else share.most_at_once,
        tokens_per_s=result.rates.best_tokens_per_s,
        ttft_p50_ms=result.latency.ttft.p50,
        waited_inside=None if share is None else share.waited_inside,
        is_direct=is_direct,
        answers_per_s=result.rates.best_requests_per_s,
    )


def ramp_rates(points: Sequence[RampPoint]) -> list[float]:
    """The rates by which these points of one ramp are compared: tokens/s, or answers/s if a server does not count.

    All answers of a ramp whose tokens are not counted are asked to be of the same length. 0 for an unknown rate.
    """
    if all(point.tokens_per_s is not None for point in points):
        return [point.tokens_per_s or 0.0 for point in points]
    return [point.answers_per_s or 0.0 for point in points]


def find_full_point(points: Sequence[RampPoint]) -> RampPoint:
    """The point with the fewest requests at once that gives at least ``FULL_RATE_SHARE`` of the highest rate.

    Raises ``ValueError`` without a point.
    """
    rates = ramp_rates(points)
    full = [point for point, rate in zip(points, rates, strict=True) if rate >= FULL_RATE_SHARE * max(rates)]
    return min(full, key=lambda point: (point.running, point.level))
