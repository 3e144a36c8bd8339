"""The number of slots is found over a network too: there, requests overtake each other, and ends are seen late."""

from __future__ import annotations

import heapq
from collections import deque
from random import Random

import pytest

from gpumesh.balancer.limits import NodeSlots, SentRequest

MODEL = "chat:latest"
PREFILL_S = 0.05
NOTICED_WAIT_S = 0.02


class FarServer:
    """A server with some slots behind a tunnel: each way takes ``way_s`` and up to 3 ms more, differently each time.

    Requests come at random times, ``load`` times as many as the server can answer."""

    def __init__(self, slots: int, *, mean_s: float, load: float, way_s: float) -> None:
        self.node = NodeSlots()
        self.node.round_trip_s = 2 * way_s
        self.now = 0.0
        self._slots, self._mean_s, self._way_s = slots, mean_s, way_s
        self._rate = load * slots / (mean_s + PREFILL_S)
        self._rng = Random(slots)
        self._events: list[tuple[float, int, str, SentRequest | None, float, float]] = []
        self._number = self._running = self._queued = 0
        self._inside: deque[tuple[SentRequest, float]] = deque()  # waiting inside the server, with the time of arrival
        self.waits: list[float] = []

    def serve(self, requests: int) -> int:
        """Serves so many requests. Returns how many of them waited inside the server."""
        self.waits = []
        at = self.now
        for _ in range(requests):
            at += self._rng.expovariate(self._rate)
            self._push(at, "queued")
        while self._events:
            self.now, _, kind, request, arrived_at, waited_s = heapq.heappop(self._events)
            if kind == "queued":
                self._queued += 1
                self._send()
                continue
            assert request is not None
            if kind == "arrived":
                self._inside.append((request, self.now))
                self._start()
            elif kind == "first token":
                self._push(self._after_way(), "first token seen", request)
                self._push(self.now + self._mean_s * self._rng.uniform(0.2, 1.8), "end", request, arrived_at, waited_s)
            elif kind == "end":
                self._running -= 1
                self._start()
                self._push(self._after_way(), "end seen", request, self.now - arrived_at, waited_s)
            elif kind == "first token seen":
                self.node.note_first_token(request, self.now)
                self._send()
            else:
                total_ms, waited_ms = arrived_at * 1000.0, waited_s * 1000.0 + 2.0
                self.node.note_answer(request, self.now, waited_ms=waited_ms, total_ms=total_ms, load_ms=20.0)
                self._send()
        return sum(waited_s > NOTICED_WAIT_S for waited_s in self.waits)

    def _send(self) -> None:
        """Sends queued requests, as many as the limit allows."""
        while self._queued and self.node.in_flight(MODEL) < self.node.max_in_flight(MODEL, self.now):
            self._queued -= 1
            self._push(self._after_way(), "arrived", self.node.note_sent(MODEL, self.now))

    def _start(self) -> None:
        """Gives free slots to the requests inside, first come first served."""
        while self._inside and self._running < self._slots:
            request, arrived_at = self._inside.popleft()
            self._running += 1
            waited_s = self.now - arrived_at
            self.waits.append(waited_s)
            self._push(self.now + PREFILL_S, "first token", request, arrived_at, waited_s)

    def _after_way(self) -> float:
        return self.now + self._way_s + self._rng.uniform(0.0, 0.003)

    def _push(
        self, at: float, kind: str, request: SentRequest | None = None, second: float = 0.0, waited_s: float = 0.0
    ) -> None:
        self._number += 1
        heapq.heappush(self._events, (at, self._number, kind, request, second, waited_s))


@pytest.mark.parametrize("way_s", [0.001, 0.06])
@pytest.mark.parametrize("load", [0.5, 0.95, 1.5])
@pytest.mark.parametrize("mean_s", [1.0, 5.0])
@pytest.mark.parametrize("slots", [1, 4, 16])
def test_the_number_is_found_and_then_at_most_one_of_50_waits(
    slots: int, mean_s: float, load: float, way_s: float
) -> None:
    server = FarServer(slots, mean_s=mean_s, load=load, way_s=way_s)
    waited = server.serve(60 * slots)
    assert server.node.limit(MODEL).proven == slots
    assert waited <= 2 * slots
    waited = server.serve(2000)
    assert server.node.limit(MODEL).proven == slots
    assert waited <= 2000 / 50
