"""Follows the requests in flight on one node, by model, and learns from them each model's limit. Pure."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Annotated

import msgspec

from gpumesh.balancer.limits.parallel_limit import (
    MOST_PROVEN,
    NOISE_MS,
    ParallelLimit,
    SlotSearch,
    count_new_trials,
    learn_limit,
    on_first_token,
    on_sent,
    return_trials,
    set_ceiling,
)

MAX_MODELS = 256  # of one node; with more, the idle model that was used first is forgotten
MAX_NAME_CHARS = 400  # of a model whose limit is stored
# We see an act of the server with a delay. So if an answer ends within SETTLE_S (and the round trip) after another
# request was sent, the server may have ended the answer before that request arrived: the two never ran together.
SETTLE_S = 0.1
# The same for an answer that ends this soon after the first token of another answer.
END_DELAY_S = 0.02
TOGETHER_S = 0.01  # requests that are sent within this time may come to the server in another order


@dataclass(slots=True, eq=False)
class _Burst:
    """Requests of one model that were sent within ``TOGETHER_S``. ``number`` counts the bursts of the node.

    ``earlier`` counts the requests of this model that were sent before the burst and were surely still inside the
    server when the burst came there. Of the burst's own requests, ``in_flight`` have not ended, ``unhindered`` have
    ended without a wait inside the server, and ``trials`` were sent beyond the proven number. ``last_concurrent`` is
    the number of requests of this model in flight on the node when the burst's last request was sent, this request
    included."""

    number: int
    began_at: float
    earlier: int
    in_flight: int = 0
    unhindered: int = 0
    trials: int = 0
    last_concurrent: int = 0


@dataclass(slots=True, eq=False)
class SentRequest:
    """A request in flight. Times are in seconds: ``first_token_at`` is ``None`` before the first token.
    ``concurrent``: the requests of its model in flight when it was sent, itself included."""

    model: str
    concurrent: int
    burst: _Burst
    first_token_at: float | None = None


@dataclass(slots=True)
class _ModelSlots:
    """The requests of one model in flight on the node, and the model's limit.

    ``in_flight`` counts the requests, and ``streaming`` the requests whose answer has begun. ``recent`` are the bursts
    that had begun shortly before the last request ended, and all bursts since. ``grown_at`` is the last time at which a
    first token made the limit grow, and ``proven_before`` the proven number before that."""

    limit: ParallelLimit = field(default_factory=ParallelLimit)
    in_flight: int = 0
    streaming: int = 0
    recent: deque[_Burst] = field(default_factory=deque)
    grown_at: float = -math.inf
    proven_before: int = 1


class _StoredLimit(msgspec.Struct, forbid_unknown_fields=True):
    """A limit as it is stored, without the trials that were running."""

    proven: Annotated[int, msgspec.Meta(ge=1, le=MOST_PROVEN)]
    search: SlotSearch


_StoredLimits = dict[Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)], _StoredLimit]


class NodeSlots:
    """Follows the requests in flight on one node, by the model's full name, and learns each model's limit.

    Each request is sent once and ends once: by ``note_answer`` or ``note_unfinished``. ``now`` is in seconds of the
    caller's clock.
    """

    def __init__(self) -> None:
        self.round_trip_s = 0.0
        """The round trip to the server in seconds. The owner sets it after each measurement."""
        self._models: dict[str, _ModelSlots] = {}  # by full name
        self._bursts = 0  # how many there have been, of all models

    def __repr__(self) -> str:
        models = (f"{model} {slots.in_flight} of {slots.limit.proven}" for model, slots in self._models.items())
        return f"<NodeSlots {', '.join(models) or 'nothing sent'}>"

    def limit(self, model: str) -> ParallelLimit:
        """What is known of this model's slots; the first guess if nothing is known."""
        slots = self._models.get(model)
        return _FIRST_GUESS if slots is None else slots.limit

    @property
    def most_proven(self) -> int:
        """The largest number of slots that was proven for any model; 1 before anything was proven."""
        return max((slots.limit.proven for slots in self._models.values()), default=1)

    def proven_slots(self) -> dict[str, int]:
        """The proven number of slots of each model of which anything is known, by its full name."""
        return {model: slots.limit.proven for model, slots in self._models.items() if _is_anything_known(slots.limit)}

    def in_flight(self, model: str) -> int:
        """The number of requests of this model in flight."""
        slots = self._models.get(model)
        return 0 if slots is None else slots.in_flight

    def max_in_flight(self, model: str, now: float) -> int:
        """The most requests of this model that may be in flight now (``ParallelLimit.max_in_flight``)."""
        slots = self._models.get(model)
        limit = _FIRST_GUESS if slots is None else slots.limit
        # The usual case, written out here because each decision asks: the next line would give the same number.
        if limit.ceiling_until is not None and now < limit.ceiling_until and limit.trials_left <= 0:
            return limit.proven
        return limit.max_in_flight(now)

    def note_sent(self, model: str, now: float) -> SentRequest:
        """Counts a request that is sent now, also if no slot is free: the caller decides whether to send it."""
        slots = self._models.get(model)
        if slots is None:
            slots = self._add_model(model)
        if not slots.recent or now - slots.recent[-1].began_at > TOGETHER_S:
            self._bursts += 1
            slots.recent.append(_Burst(self._bursts, now, earlier=slots.in_flight))
        slots.in_flight += 1
        burst = slots.recent[-1]
        burst.in_flight += 1
        burst.last_concurrent = slots.in_flight
        burst.trials += slots.in_flight > slots.limit.proven
        request = SentRequest(model, slots.in_flight, burst)
        slots.limit = on_sent(slots.limit, in_flight=slots.in_flight, now=now)
        return request

    def note_first_token(self, request: SentRequest, now: float) -> None:
        """Notes that an answer has begun: its first token has come. For an answer in one piece this may be left
        out."""
        slots = self._models[request.model]
        request.first_token_at = now
        slots.streaming += 1
        limit = on_first_token(slots.limit, streaming=slots.streaming)
        if limit is not slots.limit:  # ``_remove`` may have to take this back
            slots.grown_at, slots.proven_before, slots.limit = now, slots.limit.proven, limit

    def note_answer(
        self,
        request: SentRequest,
        now: float,
        *,
        waited_ms: float | None,
        total_ms: float | None,
        load_ms: float | None,
    ) -> None:
        """Notes that an answer is complete. The durations are the server's own, as in ``learn_limit``."""
        slots = self._remove(request, now)
        # An answer that ended just after its first token came in one piece: its first token proves nothing.
        was_streamed = request.first_token_at is not None and now - request.first_token_at > END_DELAY_S
        burst = request.burst
        if waited_ms is not None and waited_ms <= NOISE_MS:
            burst.unhindered += 1
        slots.limit = learn_limit(
            slots.limit,
            waited_ms=waited_ms,
            total_ms=total_ms,
            load_ms=load_ms,
            concurrent=burst.last_concurrent,
            overlapping=burst.earlier + burst.unhindered,
            burst_is_complete=burst.in_flight == 0,
            trials=max(burst.trials, 1),
            streamed=was_streamed,
            now=now,
        )

    def note_unfinished(self, request: SentRequest, now: float) -> None:
        """Notes that a request has ended without a complete answer: its client has gone, or it failed."""
        slots = self._remove(request, now)
        slots.limit = return_trials(slots.limit, concurrent=request.concurrent)

    def _remove(self, request: SentRequest, now: float) -> _ModelSlots:
        """Removes a request that has ended from the counts. Corrects conclusions that were drawn because it seemed to
        run."""
        slots = self._models[request.model]
        slots.in_flight -= 1
        request.burst.in_flight -= 1
        while slots.recent and now - slots.recent[0].began_at > SETTLE_S + self.round_trip_s:
            slots.recent.popleft()
        for burst in slots.recent:
            if request.burst.number < burst.number:
                burst.earlier -= 1  # this request may have left the server before the burst came there
        if request.first_token_at is not None:
            slots.streaming -= 1
            has_just_grown = now - slots.grown_at <= END_DELAY_S and slots.limit.proven > slots.proven_before
            if has_just_grown:
                # The limit grew because this answer and a new answer seemed to run together. But the server may have
                # ended this answer before it began the new one. So the last step is undone, and a new trial decides.
                proven = slots.limit.proven - 1
                trials_left = max(min(slots.limit.trials_left, proven), 1)
                slots.limit = replace(slots.limit, proven=proven, trials_left=trials_left)
        return slots

    def _add_model(self, model: str) -> _ModelSlots:
        """Adds a model. With too many models, forgets an idle one."""
        if len(self._models) >= MAX_MODELS:
            idle = next((name for name, slots in self._models.items() if slots.in_flight == 0), None)
            if idle is not None:
                del self._models[idle]
        slots = self._models[model] = _ModelSlots()
        return slots

    def as_dict(self) -> dict[str, object]:
        """The limits in types that JSON has. Left out are models of which nothing is known, and names of more than
        ``MAX_NAME_CHARS``."""
        return {
            model: {"proven": slots.limit.proven, "search": slots.limit.search.value}
            for model, slots in self._models.items()
            if _is_anything_known(slots.limit) and len(model) <= MAX_NAME_CHARS
        }

    def restore(self, document: object, *, now: float) -> None:
        """Takes the limits that ``as_dict`` has stored, for the models that have not been used yet. Raises ValueError
        for a document of another form, and then changes nothing."""
        stored_limits = msgspec.convert(document, _StoredLimits)
        for model, stored in list(stored_limits.items())[:MAX_MODELS]:
            if model not in self._models:
                trials_left = count_new_trials(stored.search, stored.proven)
                limit = ParallelLimit(stored.proven, trials_left, stored.search)
                is_known = stored.search is SlotSearch.KNOWN
                self._add_model(model).limit = set_ceiling(limit, now) if is_known else limit

    def replace_idle(self, document: object, *, now: float) -> None:
        """As ``restore``, but also for the models that have been used and have no request in flight, because the
        document is newer."""
        for model in msgspec.convert(document, _StoredLimits):
            if model in self._models and not self._models[model].in_flight:
                del self._models[model]
        self.restore(document, now=now)


def _is_anything_known(limit: ParallelLimit) -> bool:
    """Whether the limit is more than the first guess: slots were proven, or slow start has ended."""
    return limit.proven != 1 or limit.search is not SlotSearch.DOUBLING


_FIRST_GUESS = ParallelLimit()
