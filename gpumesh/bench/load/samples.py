"""What a stage yields: the outcome of each request, and how busy the load generator was. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gpumesh.backends.base import ServerCounters
from gpumesh.bench.load.conditions import LoadConditions
from gpumesh.bench.workload.stages import Stage


class SampleOutcome(StrEnum):
    """How a request ended, as the client of a benchmark sees it."""

    SERVED = "served"
    FAILED = "failed"
    CUT = "cut"
    """The answer began and did not reach its end."""
    UNFINISHED = "unfinished"
    """The run was ended before the answer did: the request has not failed."""


@dataclass(frozen=True, slots=True)
class LoadSample:
    """The outcome of one request. Times are seconds since the start of the stage.

    ``index`` is the number of the request in its stage, from 0. ``intended_s`` is when an open loop should have sent
    the request, ``sent_s`` when it was sent; in a closed loop both are equal. ``attempts`` is 0 if the answer did not
    end well. ``arrivals_s`` has one time for each piece of the answer. ``tokens`` and ``prompt_tokens`` are the
    server's own counts, ``None`` if it gave none: the number of pieces is not the number of tokens.

    ``node`` ended the answer, ``first_node`` began it. ``text`` is the answer, kept in a disturbed stage only.
    """

    stage: str
    index: int
    outcome: SampleOutcome
    intended_s: float
    sent_s: float
    ended_s: float
    node: str | None = None
    attempts: int = 0
    route: str | None = None
    arrivals_s: tuple[float, ...] = ()
    tokens: int | None = None
    prompt_tokens: int | None = None
    counters: ServerCounters | None = None
    done_reason: str | None = None
    error_code: str | None = None
    error: str | None = None
    first_node: str | None = None
    text: str | None = None

    @property
    def ttft_ms(self) -> float | None:
        """From the intended moment of sending to the first piece; ``None`` if no piece arrived."""
        if not self.arrivals_s:
            return None
        return (self.arrivals_s[0] - self.intended_s) * 1000.0

    @property
    def end_to_end_ms(self) -> float | None:
        """From the intended moment of sending to the end of the answer; ``None`` unless the request was served."""
        if self.outcome is not SampleOutcome.SERVED:
            return None
        return (self.ended_s - self.intended_s) * 1000.0

    @property
    def last_token_ms(self) -> float | None:
        """From the intended moment of sending to the last piece; ``None`` if no piece arrived."""
        if not self.arrivals_s:
            return None
        return (self.arrivals_s[-1] - self.intended_s) * 1000.0


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """How busy the load generator's process was: CPU time ÷ wall time (1 is one core), and the lag of its event loop.

    ``late_sends`` is the number of requests that were sent too late (``client_judge``). ``bound`` is a sentence that
    says why the figures may not be those of the servers (``LoadConditions.reason``); ``None`` if there is no reason.
    """

    cpu: float
    lag_p99_ms: float
    late_sends: int = 0
    bound: str | None = None


@dataclass(frozen=True, slots=True)
class StageRun:
    """A stage as it was run, with the outcome of each request in ``records``.

    ``disturbed_s`` is when the disturbance began and ended, in seconds of the stage; ``disturbance`` describes it.
    ``conditions`` are ``None`` for a run that nobody has measured. ``start_s`` is the start of the stage on
    ``time.perf_counter``.
    """

    stage: Stage
    records: tuple[LoadSample, ...]
    duration_s: float
    client: ClientLoad
    disturbed_s: tuple[float, float] | None = None
    disturbance: str | None = None
    conditions: LoadConditions | None = None
    start_s: float = 0.0
