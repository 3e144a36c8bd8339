"""The circuit breakers of a node and of its models: closed, open, and half-open with one trial at a time. Pure.

A node has one ``Breaker`` for what shows that the node itself is broken, and ``ModelBreakers`` for models that fail
there while others may work. ``outcomes.find_blame`` decides which breaker an outcome counts for. A client's cancel, a
4xx of the request itself and a 429 never reach a breaker.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from enum import StrEnum

from gpumesh.balancer.outcomes import Blame
from gpumesh.state import ModelInfo

THRESHOLD = 3  # failures in a row that open a node's breaker
# How long a node's breaker stays open. The time doubles with each failed trial.
FIRST_OPEN_S = 1.0
MAX_OPEN_S = 30.0

MAX_MODEL_FAULTS = 64  # of one node; with more, the fault that is known longest is forgotten
# So many different models that fail in a row, with no success between, show that the node itself is broken.
FAILED_MODELS_OPEN_NODE = 3
SERVED_LATELY_S = 600.0  # a model that was served this recently can be loaded, so one failed load does not open it


@dataclass(frozen=True, slots=True)
class BreakerPace:
    """When a breaker opens, and for how long. ``threshold``: the failures in a row that open it. ``first_open_s`` and
    ``max_open_s``: the seconds for which it is open at first, and at most; the time doubles with each failed trial."""

    threshold: int
    first_open_s: float
    max_open_s: float


NODE_PACE = BreakerPace(THRESHOLD, FIRST_OPEN_S, MAX_OPEN_S)
# A failed trial of a model costs more than a failed trial of a node: the load takes seconds, and pushes other models
# out of the memory.
MODEL_PACE = BreakerPace(THRESHOLD, 5.0, 300.0)
# A model that is listed and not there stays away until the list changes. It is asked for again after this time
# nevertheless, because the answer may have come from only one of several servers behind one address.
MISSING_PACE = BreakerPace(1, 900.0, 900.0)


class BreakerPhase(StrEnum):
    """Whether a breaker lets requests through: all while closed, none while open, one trial at a time while
    half-open."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Breaker:
    """One state of a breaker. The object never changes: after an event, a method returns the new state.

    ``failures`` counts the failures since the last success. The breaker is open until ``open_until``, a time of the
    caller's monotonic clock in seconds; ``None`` while it is closed. ``open_s``: for how many seconds it was opened
    last, or, before that, for how many it will be opened first. ``trial_in_flight``: the half-open breaker has let one
    request through, and that request has not ended."""

    failures: int = 0
    open_until: float | None = None
    open_s: float = FIRST_OPEN_S
    trial_in_flight: bool = False
    pace: BreakerPace = NODE_PACE

    def phase(self, now: float) -> BreakerPhase:
        """The phase at the time ``now``, in seconds of the caller's clock."""
        if self.open_until is None:
            return BreakerPhase.CLOSED
        return BreakerPhase.OPEN if now < self.open_until else BreakerPhase.HALF_OPEN

    def allows(self, now: float) -> bool:
        """Whether a request may be sent: while closed always, while open never, while half-open if no trial is in
        flight."""
        return self.open_until is None or (now >= self.open_until and not self.trial_in_flight)

    def record_start(self, now: float) -> Breaker:
        """The state after a request was sent: it is the trial if the breaker is half-open."""
        if self.phase(now) is BreakerPhase.HALF_OPEN:
            return replace(self, trial_in_flight=True)
        return self

    def record_success(self) -> Breaker:
        """The state after a request succeeded: closed, without failures."""
        return _CLOSED if self.pace is NODE_PACE else closed_breaker(self.pace)

    def record_failure(self, now: float) -> Breaker:
        """The state after a request failed by the fault of the node, or of the model, whose breaker this is.

        ``pace.threshold`` failures open a closed breaker. A failed trial opens the breaker again, for twice as long as
        before. While the breaker is open, a failure is only counted: its request was sent before the breaker opened.
        """
        failures = self.failures + 1
        if self.open_until is None and failures < self.pace.threshold:
            return replace(self, failures=failures)
        return self.trip(now)

    def trip(self, now: float) -> Breaker:
        """The state after a failure that opens a closed breaker at once, even if it is the first failure. In the other
        phases the failure counts as in ``record_failure``."""
        failures = self.failures + 1
        phase = self.phase(now)
        if phase is BreakerPhase.OPEN:
            return replace(self, failures=failures)
        if phase is BreakerPhase.CLOSED:
            failures, open_s = max(failures, self.pace.threshold), self.open_s
        else:
            open_s = min(self.open_s * 2, self.pace.max_open_s)
        return Breaker(failures, now + open_s, open_s, pace=self.pace)

    def forgive_failure(self, now: float) -> Breaker:
        """The state with one failure less: another node has failed at the same request too, so the failure was probably
        not this node's fault."""
        failures = max(self.failures - 1, 0)
        if self.open_until is None:
            return replace(self, failures=failures)
        if failures < self.pace.threshold:  # without the forgiven failure the breaker would not have opened: close it
            return replace(closed_breaker(self.pace), failures=failures)
        # The other failures still count, but the breaker is half-open at once: the next request may be its trial.
        return replace(self, failures=failures, open_until=min(self.open_until, now), trial_in_flight=False)

    def cancel_trial(self) -> Breaker:
        """The state without a trial in flight, so that another request may be the trial.

        For a trial that ended in a way that proves nothing about the node (the client left, for example). Also for a
        trial whose answer has begun: other requests need not wait for the end of this answer.
        """
        return replace(self, trial_in_flight=False)


def closed_breaker(pace: BreakerPace) -> Breaker:
    """A closed breaker without failures."""
    return Breaker(open_s=pace.first_open_s, pace=pace)


_CLOSED = Breaker()
"""``closed_breaker(NODE_PACE)``, made once: each served request needs it."""


@dataclass(frozen=True, slots=True)
class ModelFault:
    """A model that fails on a node, and its breaker there. ``model`` is the full name, from a client's request.
    ``blame`` is that of the last failure. ``message`` is the server's error if a load failed, safe to print; for any
    other failure it is empty.

    ``confirmed`` matters for a missing model only: since the server answered that it does not have the model, it has
    listed the model again.
    """

    model: str
    blame: Blame
    message: str
    breaker: Breaker
    confirmed: bool = False


_NO_MODELS: AbstractSet[str] = frozenset()


class ModelBreakers:
    """The breakers of one node's models, by full name. A model without a failure has none.

    A model that cannot be loaded, or that is listed and not there, gets no requests on this node, while the node serves
    its other models. ``faults`` are the models that have failed here lately; only the methods here change it. All times
    are seconds of the caller's monotonic clock.
    """

    def __init__(self) -> None:
        self.faults: dict[str, ModelFault] = {}
        self._failed_in_row: set[str] = set()  # the models that failed since the node's last success
        self._served_at: dict[str, float] = {}  # when each model was served last
        self._catalog: Sequence[ModelInfo] | None = None  # the server's last list of models

    def __repr__(self) -> str:
        return f"<ModelBreakers {', '.join(sorted(self.faults)) or 'no fault'}>"

    # -- questions -----------------------------------------------------------------------------------------------

    def broken(self, now: float, *, despite_doubt: bool = False) -> AbstractSet[str]:
        """The models that must not be asked for now. ``despite_doubt``: models that failed for an unknown reason are
        left out, so that they are tried; models that cannot be loaded or are missing are not."""
        if not self.faults:  # the usual case; this is asked for each request
            return _NO_MODELS
        return frozenset(
            model
            for model, fault in self.faults.items()
            if not fault.breaker.allows(now) and not (despite_doubt and fault.blame is Blame.MODEL)
        )

    def pause_left(self, model: str, now: float) -> float | None:
        """The seconds until a request for this broken model may be tried. 0: the pause is over, and a trial is in
        flight whose end decides. ``None``: the model is not broken."""
        fault = self.faults.get(model)
        if fault is None or fault.breaker.open_until is None or fault.breaker.allows(now):
            return None
        return max(fault.breaker.open_until - now, 0.0)

    def find_fault(self, model: str) -> ModelFault | None:
        """The fault of this model; ``None`` if it has none, or if its breaker has not opened."""
        fault = self.faults.get(model)
        return fault if fault is not None and fault.breaker.open_until is not None else None

    @property
    def open_faults(self) -> tuple[ModelFault, ...]:
        """The faults whose breakers have opened and have not closed since, sorted by the model's name."""
        models = sorted(model for model, fault in self.faults.items() if fault.breaker.open_until is not None)
        return tuple(self.faults[model] for model in models)

    # -- events --------------------------------------------------------------------------------------------------

    def record_start(self, model: str, now: float) -> None:
        """Notes that a request for the model was sent: it is the trial if the model's breaker is half-open."""
        fault = self.faults.get(model)
        if fault is not None:
            self.faults[model] = replace(fault, breaker=fault.breaker.record_start(now))

    def record_success(self, model: str | None, now: float) -> None:
        """Notes that the node has served a request that needed inference. ``model`` is ``None`` if the request named no
        model."""
        if self._failed_in_row:
            self._failed_in_row.clear()
        if model is None:
            return
        if self.faults:
            self.faults.pop(model, None)
        if len(self._served_at) > 1:
            self._served_at.pop(model, None)  # so that the model moves to the end: the dict is in order of last use
        self._served_at[model] = now
        if len(self._served_at) > MAX_MODEL_FAULTS:
            del self._served_at[next(iter(self._served_at))]  # the model that was served longest ago

    def record_failure(
        self, model: str, blame: Blame, message: str, now: float, *, was_loaded: bool | None = None
    ) -> bool:
        """Notes that a request failed by the model's fault. ``was_loaded``: the model was in memory when the request
        was sent; ``None`` if that is not known. Returns whether the failure makes the node itself suspect: this model
        has failed for the first time since the node's last success, and so have several others."""
        if blame is Blame.MISSING_MODEL and self._catalog is None:
            return False  # the server could not list its models, so nothing says that it should have this one
        pace = MISSING_PACE if blame is Blame.MISSING_MODEL else MODEL_PACE
        old = self.faults.pop(model, None)  # so that the model becomes the newest
        breaker = old.breaker if old is not None and old.breaker.pace is pace else closed_breaker(pace)
        # A server that says that it cannot load a model will say so again. But if the model was in memory, or was
        # served lately, the load may have failed for this request alone (a huge ``num_ctx``).
        can_be_loaded = was_loaded or self._was_served_lately(model, now)
        is_certain = blame is Blame.MODEL_LOAD and not can_be_loaded
        breaker = breaker.trip(now) if is_certain else breaker.record_failure(now)
        self.faults[model] = ModelFault(model, blame, message, breaker)
        if len(self.faults) > MAX_MODEL_FAULTS:
            del self.faults[next(iter(self.faults))]
        if blame is Blame.MISSING_MODEL or model in self._failed_in_row:  # a missing model says nothing of the node
            return False
        self._failed_in_row.add(model)
        return len(self._failed_in_row) >= FAILED_MODELS_OPEN_NODE

    def _was_served_lately(self, model: str, now: float) -> bool:
        served_at = self._served_at.get(model)
        return served_at is not None and now - served_at < SERVED_LATELY_S

    def cancel_trial(self, model: str | None) -> bool:
        """Notes that the request for the model is no longer a trial (``Breaker.cancel_trial``). Returns whether a trial
        of this model was in flight."""
        fault = self.faults.get(model) if model is not None else None
        if fault is None or not fault.breaker.trial_in_flight:
            return False
        self.faults[fault.model] = replace(fault, breaker=fault.breaker.cancel_trial())
        return True

    def forgive_failure(self, model: str, now: float) -> None:
        """Takes back one failure of the model: the request was at fault, because another node failed at it too."""
        fault = self.faults.get(model)
        if fault is None:
            return
        self._failed_in_row.discard(model)
        breaker = fault.breaker.forgive_failure(now)
        if breaker.failures == 0:
            del self.faults[model]
        else:
            self.faults[model] = replace(fault, breaker=breaker)

    def note_catalog(self, catalog: Sequence[ModelInfo]) -> None:
        """Takes the server's list of models from a new probe. If it differs from the last list, all faults are
        forgotten: a person has changed the models. If not, the server has listed the missing models again, and their
        faults become ``confirmed``."""
        old_catalog, self._catalog = self._catalog, catalog
        if not self.faults or old_catalog is None:
            return
        # The sets decide, because the order of a list means nothing. Equal lists are found faster, so they come first.
        if catalog != old_catalog and set(catalog) != set(old_catalog):
            self.faults.clear()
            self._failed_in_row.clear()
            return
        for model, fault in self.faults.items():
            if fault.blame is Blame.MISSING_MODEL and not fault.confirmed:
                self.faults[model] = replace(fault, confirmed=True)

    def forget_all(self) -> None:
        """Forgets all faults, because the connection or the server is new."""
        self.faults.clear()
        self._failed_in_row.clear()
        self._served_at.clear()
        self._catalog = None
