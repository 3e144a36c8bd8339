"""``ModelDemand``: how often each model is asked for, and how long its requests run. Pure.

From this the forecasts see what it costs to unload a model: a model that is often asked for must soon be loaded again.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from gpumesh.balancer.base import ResidencyKey

WINDOW_S = 60.0  # the time constant of the rate: a burst of requests is forgotten after some minutes
SAME_TIME_S = 0.05  # requests that come within this time count as coming at the same time
FIRST_SPAN_S = 10.0  # after the first request, the rate is one request in this time
MAX_KEYS = 1000  # a client can ask for any context length, and each length makes a new key
SMOOTHING = 0.1  # the weight of the newest request's time in the mean time that a request runs
FIRST_SERVICE_S = 5.0  # the expected time of a request, before any request has ended


@dataclass(slots=True)
class _Demand:
    """The demand for one key. ``weight`` is the sum over its requests of exp(-age / WINDOW_S), as it was at the time
    ``at``. The first request came at ``since``. ``service_s`` is the mean time that ``services`` requests ran. ``rate``
    is the rate as it was at the time ``rated_at``."""

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
        """Counts a request with this key that has come now."""
        demand = self._demands.get(key)
        if demand is None:
            self._demands[key] = _Demand(1.0, now, now)
            if len(self._demands) > MAX_KEYS:
                self._demands.popitem(last=False)  # the key whose last request is longest ago
            return
        self._demands.move_to_end(key)
        if now - demand.at < SAME_TIME_S:  # too little time for the weight to fade
            demand.weight += 1.0
            return
        demand.weight = demand.weight * math.exp((demand.at - now) / WINDOW_S) + 1.0
        demand.at = now

    def note_service(self, key: ResidencyKey, seconds: float) -> None:
        """Notes that a request has run for ``seconds``, without the load of its model."""
        demand = self._demands.get(key)
        if demand is None:
            return
        demand.services += 1
        # At first the mean of all requests, later a mean that forgets old requests.
        demand.service_s += max(SMOOTHING, 1.0 / demand.services) * (seconds - demand.service_s)

    def rate(self, key: ResidencyKey, now: float) -> float:
        """The recent rate in requests per second; 0 for a key without any request."""
        demand = self._demands.get(key)
        if demand is None:
            return 0.0
        if demand.rated_at == now:  # the rate is needed again for each node that is compared for one request
            return demand.rate
        # A constant rate r has the weight r * WINDOW_S * (1 - exp(-age / WINDOW_S)) after the time ``age``.
        span_s = WINDOW_S * (1.0 - math.exp(-(now - demand.since + FIRST_SPAN_S) / WINDOW_S))
        demand.rate = demand.weight * math.exp((demand.at - now) / WINDOW_S) / span_s
        demand.rated_at = now
        return demand.rate

    def service_s(self, key: ResidencyKey) -> float:
        """The mean time in seconds that a request with this key runs, without the load of its model."""
        demand = self._demands.get(key)
        return FIRST_SERVICE_S if demand is None else demand.service_s
