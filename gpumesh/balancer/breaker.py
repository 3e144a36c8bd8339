"""The circuit breaker of a node: closed, open, and half-open with one trial at a time. Pure.

A client's cancel, a 4xx and a 429 are no fault of the node. They never reach the breaker
(``outcomes.rule_for_outcome`` decides that).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

THRESHOLD = 3  # failures in a row that open the breaker
# How long the breaker stays open. The time doubles with each failed trial.
FIRST_OPEN_S = 1.0
MAX_OPEN_S = 30.0


class BreakerPhase(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Breaker:
    """One state of a node's breaker. The object never changes: after an event, a method returns the new state.

    ``failures`` counts the failures since the last success. The breaker is open until ``open_until``, a time of the
    caller's monotonic clock in seconds; ``None`` while it is closed. ``open_s``: for how many seconds it was opened
    last, or, before that, for how many it will be opened first. ``trial_in_flight``: the half-open breaker has let one
    request through, and that request has not ended."""

    failures: int = 0
    open_until: float | None = None
    open_s: float = FIRST_OPEN_S
    trial_in_flight: bool = False

    def phase(self, now: float) -> BreakerPhase:
        """The phase at the time ``now``, in seconds of the caller's clock."""
        if self.open_until is None:
            return BreakerPhase.CLOSED
        return BreakerPhase.OPEN if now < self.open_until else BreakerPhase.HALF_OPEN

    def allows(self, now: float) -> bool:
        """Whether a request may be sent to the node: any request while closed, none while open, and only one at a time
        while half-open."""
        return self.open_until is None or (now >= self.open_until and not self.trial_in_flight)

    def record_start(self, now: float) -> Breaker:
        """The state after a request was sent to the node: it is the trial if the breaker is half-open."""
        if self.phase(now) is BreakerPhase.HALF_OPEN:
            return replace(self, trial_in_flight=True)
        return self

    def record_success(self) -> Breaker:
        """The state after a request succeeded: closed, without failures."""
        return _CLOSED

    def record_failure(self, now: float) -> Breaker:
        """The state after a request failed by the node's fault.

        ``THRESHOLD`` failures open a closed breaker. A failed trial opens the breaker again, for twice as long as
        before. While the breaker is open, a failure is only counted: its request was sent before the breaker opened.
        """
        failures = self.failures + 1
        if self.phase(now) is BreakerPhase.HALF_OPEN:
            open_s = min(self.open_s * 2, MAX_OPEN_S)
            return Breaker(failures, now + open_s, open_s)
        if failures >= THRESHOLD and self.open_until is None:
            return Breaker(failures, now + self.open_s, self.open_s)
        return replace(self, failures=failures)

    def forgive_failure(self, now: float) -> Breaker:
        """The state with one failure less. That failure was not the node's fault after all, because another node failed
        at the same request."""
        failures = max(self.failures - 1, 0)
        if self.open_until is None:
            return replace(self, failures=failures)
        if failures < THRESHOLD:
            return Breaker(failures)  # closed: without that failure the breaker would not have opened
        # The other failures still count, but the breaker is half-open at once: the next request may be its trial.
        return replace(self, failures=failures, open_until=min(self.open_until, now), trial_in_flight=False)

    def cancel_trial(self) -> Breaker:
        """The state without a trial in flight, so that another request may be the trial.

        For a trial that ended in a way that proves nothing about the node (the client left, for example). Also for a
        trial whose answer has begun: other requests need not wait for the end of this answer.
        """
        return replace(self, trial_in_flight=False)


_CLOSED = Breaker()
