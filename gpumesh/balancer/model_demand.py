"""``ModelDemand``: how often each model is asked for, and how long it then works. Pure.

It tells what it would cost to unload a model: a model that is asked for again in a moment must be loaded again.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from gpumesh.balancer.base import ResidencyKey

WINDOW_S = 60.0  # the time constant of the rate: a burst of requests is forgotten after some minutes
SAME_TIME_S = 0.05  # requests that come within this time count as one burst
FIRST_SPAN_S = 10.0  # the first request counts as one in this time
MAX_KEYS = 1000  # a client can ask for any context length, and each makes a key of its own
SMOOTHING = 0.1  # weight of the newest time in the mean time of service
FIRST_SERVICE_S = 5.0  # of an answer, before one was seen


@dataclass(slots=True)
class _Demand:
    """``weight`` is the sum over the requests of exp(-age / WINDOW_S), as it was at the time ``at``. The first request
    came at ``since``. ``rate`` is the rate as it was at the time ``rated_at``."""

    weight: float
    at: float
    since: float
    service_s: float = FIRST_SERVICE_S
    rate: float = 0.0
    rated_at: float = -math.inf
    services: int = 0


class ModelDemand:
    """The demand by residency key. Times are seconds of the caller's clock."""

    def __init__(self) -> None:
        self._demands: OrderedDict[ResidencyKey, _Demand] = OrderedDict()

    def note_request(self, key: ResidencyKey, now: float) -> None:
        demand = self._demands.get(key)
        if demand is None:
            self._demands[key] = _Demand(1.0, now, now)
            if len(self._demands) > MAX_KEYS:
                self._demands.popitem(last=False)  # the key that was not asked for longest
            return
        self._demands.move_to_end(key)
        if now - demand.at < SAME_TIME_S:
            demand.weight += 1.0
            return
        demand.weight = demand.weight * math.exp((demand.at - now) / WINDOW_S) + 1.0
        demand.at = now

    def note_service(self, key: ResidencyKey, seconds: float) -> None:
        """A request has run for so long, without the load of its model."""
        demand = self._demands.get(key)
        if demand is None:
            return
        demand.services += 1
        demand.service_s += max(SMOOTHING, 1.0 / demand.services) * (seconds - demand.service_s)

    def rate(self, key: ResidencyKey, now: float) -> float:
        """Requests per second, lately; 0 for a key that nobody has asked for."""
        demand = self._demands.get(key)
        if demand is None:
            return 0.0
        if demand.rated_at == now:  # it is asked for each node that is compared for a request
            return demand.rate
        # A constant rate r has the weight r * WINDOW_S * (1 - exp(-age / WINDOW_S)) after the time ``age``.
        span_s = WINDOW_S * (1.0 - math.exp(-(now - demand.since + FIRST_SPAN_S) / WINDOW_S))
        demand.rate = demand.weight * math.exp((demand.at - now) / WINDOW_S) / span_s
        demand.rated_at = now
        return demand.rate

    def service_s(self, key: ResidencyKey) -> float:
        """The mean time in seconds that a request runs."""
        demand = self._demands.get(key)
        return FIRST_SERVICE_S if demand is None else demand.service_s
