"""Learns how many requests of one model a server really runs in parallel (its slots). Pure.

Ollama never answers 503 because a GPU is busy: requests past ``OLLAMA_NUM_PARALLEL`` wait inside it, unseen. There are
two signs of how many slots it has:

- Answers that come at the same time: when ``k`` answers have begun and none of them has ended, there are ``k`` slots.
  This is known at the first token, while the answers still run.
- Durations: ``total - load - prompt_eval - eval`` in the final frame is the time that the request waited inside
  (docs/internals/ollama.md, "Queueing"). This is known only at the end, but also for answers that are not streamed.

The number is found as TCP finds the rate of a path (slow start, RFC 5681): as many requests again as are proven may be
sent, and the proven number grows with each first token, so it doubles in about the time of one first token. Once a
request has waited inside the server, the number is known. From then on one request more is tried, at long intervals.

The number belongs to a model on a node: Ollama runs embedding models with one slot, whatever ``OLLAMA_NUM_PARALLEL``
is. ``NodeSlots`` follows the requests in flight on one node and holds its limits.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Annotated

import msgspec

# On an idle server the time that no duration covers stays below the larger of these two. The share is of the total.
NOISE_MS = 50.0
NOISE_SHARE = 0.05
# A shorter load_duration is no load: a model that is in memory reports some ms too.
LOAD_NOISE_MS = 200.0
# How long, and for how many answers at least, the proven number is the limit before one request more is tried again. So
# at most one request in 50 waits inside the server.
CEILING_S = 300.0
CEILING_ANSWERS = 50
# A server that claims to run more requests together is not believed: its queue would be out of our control.
MOST_PROVEN = 512
MAX_MODELS = 256  # of one node; with more, the idle model that was used first is forgotten
MAX_NAME_CHARS = 400  # of a model whose limit is stored
# What the server does is seen later here. So when an answer ends this soon after another request was sent, or after an
# answer has begun, the two may not have run together.
SETTLE_S = 0.1
END_DELAY_S = 0.02
# Many slots are given up in steps of this share, few slots one at a time: a restart with 4 slots instead of 32 is
# followed within a few answers.
SHRINK_SHARE = 1 / 8


@dataclass(frozen=True, slots=True)
class ParallelLimit:
    """What is known about how many requests of one model a node runs in parallel.

    - ``proven``: the largest number of requests that ran together without waiting inside the server.
    - ``trials_left``: how many requests may still be sent beyond ``proven`` before one of those that were sent beyond
      it has proven something.
    - ``has_been_full``: a request has waited inside the server. Before that, the number grows by doubling; afterwards,
      one at a time.
    - ``ceiling_until``: until this time (seconds of the caller's clock) no request may be sent beyond ``proven``,
      unless there are trials left. ``None``: no trial has failed since the number grew last.
    - ``answers_below_ceiling``: the answers since the ceiling was set, counted up to ``CEILING_ANSWERS``.
    """

    proven: int = 1
    trials_left: int = 1
    has_been_full: bool = False
    ceiling_until: float | None = None
    answers_below_ceiling: int = 0

    def max_in_flight(self, now: float) -> int:
        """The most requests that may be in flight now. During slow start it is twice the proven number. Later it is the
        proven number, or one more when a trial is due."""
        if self.trials_left > 0:
            return self.proven + 1 if self.has_been_full else 2 * self.proven
        return self.proven + 1 if self._is_retry_due(now) else self.proven

    def _is_retry_due(self, now: float) -> bool:
        """Whether the last failed trial is so long ago that one request more may be tried."""
        if self.ceiling_until is None:
            return True
        return now >= self.ceiling_until and self.answers_below_ceiling >= CEILING_ANSWERS


def on_sent(limit: ParallelLimit, *, in_flight: int, now: float) -> ParallelLimit:
    """Returns the limit after a request was sent. ``in_flight``: the requests of this model in flight on the node, this
    request included. A request beyond the proven number uses up a trial; with the last trial the ceiling begins."""
    if in_flight <= limit.proven:
        return limit
    trials_left = max(limit.trials_left - 1, 0)
    if trials_left > 0:
        return replace(limit, trials_left=trials_left)
    return replace(limit, trials_left=0, ceiling_until=now + CEILING_S, answers_below_ceiling=0)


def on_first_token(limit: ParallelLimit, *, streaming: int) -> ParallelLimit:
    """Returns the limit after a streamed answer has begun.

    ``streaming``: the answers of this model on the node that have begun and not ended, this answer included. An answer
    has ended when its last frame has come from the server, even if the client has not read it yet: otherwise a slow
    client would make the server look larger. It does not matter whether the model had to be loaded before: answers that
    run together need a slot each.
    """
    return _grow(limit, streaming) if streaming > limit.proven else limit


def learn_limit(
    limit: ParallelLimit,
    *,
    waited_ms: float | None,
    total_ms: float | None,
    concurrent: int,
    now: float,
    load_ms: float | None = None,
    overlapping: int | None = None,
    streamed: bool = False,
) -> ParallelLimit:
    """Returns the limit after one answer.

    ``waited_ms`` is the part of ``total_ms`` in which the request waited inside the server, ``load_ms`` the time for
    which it waited until the model was loaded. All are the server's own durations, ``None`` if the server gave none.
    ``concurrent`` counts the requests of this model that were in flight on the node when this request was sent, this
    request included. ``overlapping`` counts those of them that were surely still inside the server when this request
    came there; ``None``: all of them. ``now`` is in seconds. ``streamed``: ``on_first_token`` was called for this
    answer.

    An answer that waited for a load shows nothing about slots: while it waited, the requests before it may have ended.
    """
    limit = _count_answer(limit)
    is_loaded_for = load_ms is not None and load_ms > LOAD_NOISE_MS
    has_durations = _is_duration(waited_ms) and _is_duration(total_ms)
    if waited_ms is None or total_ms is None or is_loaded_for or not has_durations:
        # A streamed answer could have proven something by its first token. Any other answer was no trial at all.
        return limit if streamed and not is_loaded_for else return_trial(limit, concurrent=concurrent)
    exceeds_proven = concurrent > limit.proven
    if waited_ms > max(NOISE_MS, NOISE_SHARE * total_ms):
        sent_at = now - total_ms / 1000.0
        return _stop_growth(limit, concurrent, now) if exceeds_proven else _shrink(limit, sent_at, now)
    # A wait above NOISE_MS is within the noise of a long answer, but the request may have waited for the end of another
    # one. So it does not prove anything.
    if not exceeds_proven or waited_ms > NOISE_MS:
        return limit
    overlapping = concurrent if overlapping is None else overlapping
    return _grow(limit, overlapping) if overlapping > limit.proven else return_trial(limit, concurrent=concurrent)


def return_trial(limit: ParallelLimit, *, concurrent: int) -> ParallelLimit:
    """Returns the limit after a request has ended without a sign: its client has gone, or it failed. If the request was
    a trial, another trial may be sent instead. ``concurrent`` is as in ``learn_limit``."""
    if concurrent <= limit.proven:
        return limit
    most_trials = 1 if limit.has_been_full else limit.proven
    return replace(limit, trials_left=min(limit.trials_left + 1, most_trials))


def _grow(limit: ParallelLimit, proven: int) -> ParallelLimit:
    """The limit with a larger proven number: during slow start as many trials again, later one."""
    proven = min(proven, MOST_PROVEN)
    if proven <= limit.proven:
        return limit
    return ParallelLimit(proven, 1 if limit.has_been_full else proven, limit.has_been_full)


def _stop_growth(limit: ParallelLimit, concurrent: int, now: float) -> ParallelLimit:
    """The limit after a request beyond the proven number has waited. If it was the next after the proven number, the
    number is known. Otherwise slow start has gone too far, and the next after the proven number is tried."""
    if concurrent == limit.proven + 1:
        return _set_ceiling(limit, now)
    return limit if limit.has_been_full else replace(limit, trials_left=1, has_been_full=True)


def _set_ceiling(limit: ParallelLimit, now: float) -> ParallelLimit:
    """The limit when the proven number is known to be the number of slots."""
    return ParallelLimit(limit.proven, 0, True, now + CEILING_S)


def _shrink(limit: ParallelLimit, sent_at: float, now: float) -> ParallelLimit:
    """The limit after a request within the proven number has waited: the server was restarted with fewer slots, or
    other clients use it.

    Many requests that were sent together wait together, so the limit shrinks once for them: a request that was sent
    before the ceiling was set says nothing new.
    """
    if limit.ceiling_until is not None and sent_at < limit.ceiling_until - CEILING_S:
        return limit
    step = max(int(limit.proven * SHRINK_SHARE), 1)
    return _set_ceiling(replace(limit, proven=max(limit.proven - step, 1)), now)


def _count_answer(limit: ParallelLimit) -> ParallelLimit:
    """Counts an answer below the ceiling, as long as the number matters."""
    if limit.ceiling_until is None or limit.answers_below_ceiling >= CEILING_ANSWERS:
        return limit
    return replace(limit, answers_below_ceiling=limit.answers_below_ceiling + 1)


def _is_duration(value: float | None) -> bool:
    """Whether a server's duration can be one."""
    return value is not None and math.isfinite(value) and value >= 0.0


# -- the limits of a node --------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class SentRequest:
    """A request in flight. ``sent_at`` is in seconds; ``concurrent`` and ``overlapping`` are as in ``learn_limit``."""

    model: str
    number: int
    sent_at: float
    concurrent: int
    overlapping: int
    has_begun: bool = False


@dataclass(slots=True)
class _ModelSlots:
    """The requests of one model in flight on the node, and the model's limit.

    ``recent`` are the requests that had been sent within ``SETTLE_S`` when the last one ended, and all that were sent
    since. ``grown_at`` is the time at which the limit grew by a first token, and ``proven_before`` the proven number
    before."""

    limit: ParallelLimit = field(default_factory=ParallelLimit)
    in_flight: int = 0
    streaming: int = 0
    recent: deque[SentRequest] = field(default_factory=deque)
    grown_at: float = -math.inf
    proven_before: int = 1


class _StoredLimit(msgspec.Struct, forbid_unknown_fields=True):
    """A limit as it is stored, without the trials that were running."""

    proven: Annotated[int, msgspec.Meta(ge=1, le=MOST_PROVEN)]
    has_been_full: bool


_StoredLimits = dict[Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)], _StoredLimit]


class NodeSlots:
    """Follows the requests in flight on one node, by the model's full name, and learns each model's limit.

    Each request is sent once and ends once, by ``end`` or ``cancel``. ``now`` is in seconds of the caller's clock.
    """

    def __init__(self) -> None:
        self._models: dict[str, _ModelSlots] = {}
        self._sent = 0

    def __repr__(self) -> str:
        models = (f"{model} {slots.in_flight} of {slots.limit.proven}" for model, slots in self._models.items())
        return f"<NodeSlots {', '.join(models) or 'nothing sent'}>"

    def limit(self, model: str) -> ParallelLimit:
        """The limit of this model; the first guess for a model of which nothing is known."""
        slots = self._models.get(model)
        return _FIRST_GUESS if slots is None else slots.limit

    def in_flight(self, model: str) -> int:
        """The number of requests of this model in flight."""
        slots = self._models.get(model)
        return 0 if slots is None else slots.in_flight

    def max_in_flight(self, model: str, now: float) -> int:
        """The most requests of this model that may be in flight now."""
        slots = self._models.get(model)
        return (_FIRST_GUESS if slots is None else slots.limit).max_in_flight(now)

    def send(self, model: str, now: float) -> SentRequest:
        """Counts a request that is sent now, even if no slot is free: the caller has decided that."""
        slots = self._models.get(model)
        if slots is None:
            slots = self._add_model(model)
        slots.in_flight += 1
        self._sent += 1
        request = SentRequest(model, self._sent, now, slots.in_flight, slots.in_flight)
        slots.recent.append(request)
        slots.limit = on_sent(slots.limit, in_flight=slots.in_flight, now=now)
        return request

    def begin(self, request: SentRequest, now: float) -> None:
        """The first token of a streamed answer has come. For an answer in one piece this must not be called."""
        slots = self._models[request.model]
        request.has_begun = True
        slots.streaming += 1
        limit = on_first_token(slots.limit, streaming=slots.streaming)
        if limit is not slots.limit:
            slots.grown_at, slots.proven_before, slots.limit = now, slots.limit.proven, limit

    def end(
        self,
        request: SentRequest,
        now: float,
        *,
        waited_ms: float | None,
        total_ms: float | None,
        load_ms: float | None,
    ) -> None:
        """An answer is complete. The durations are the server's own, as in ``learn_limit``."""
        slots = self._remove(request, now)
        slots.limit = learn_limit(
            slots.limit,
            waited_ms=waited_ms,
            total_ms=total_ms,
            load_ms=load_ms,
            concurrent=request.concurrent,
            overlapping=request.overlapping,
            streamed=request.has_begun,
            now=now,
        )

    def cancel(self, request: SentRequest, now: float) -> None:
        """A request has ended without a complete answer: its client has gone, or it failed."""
        slots = self._remove(request, now)
        slots.limit = return_trial(slots.limit, concurrent=request.concurrent)

    def _remove(self, request: SentRequest, now: float) -> _ModelSlots:
        """Takes a request that has ended out of the counts, and corrects what was concluded while it seemed to run."""
        slots = self._models[request.model]
        slots.in_flight -= 1
        while slots.recent and now - slots.recent[0].sent_at > SETTLE_S:
            slots.recent.popleft()
        for later in reversed(slots.recent):
            if later.number <= request.number:
                break
            later.overlapping -= 1  # this request may have left the server before the later one came there
        if request.has_begun:
            slots.streaming -= 1
            if now - slots.grown_at <= END_DELAY_S and slots.limit.proven > slots.proven_before:
                # The server may have ended this answer before it began the other one. Another trial will show it.
                proven, trials_left = slots.limit.proven - 1, min(slots.limit.trials_left, slots.limit.proven - 1)
                slots.limit = replace(slots.limit, proven=proven, trials_left=max(trials_left, 1))
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
            model: {"proven": slots.limit.proven, "has_been_full": slots.limit.has_been_full}
            for model, slots in self._models.items()
            if (slots.limit.proven > 1 or slots.limit.has_been_full) and len(model) <= MAX_NAME_CHARS
        }

    def restore(self, document: object, *, now: float) -> None:
        """Takes the limits of ``as_dict`` for the models that have not been used yet. Raises ValueError for any other
        document, and takes nothing of it then."""
        stored_limits = msgspec.convert(document, _StoredLimits)
        for model, stored in list(stored_limits.items())[:MAX_MODELS]:
            if model not in self._models:
                limit = ParallelLimit(stored.proven, stored.proven, stored.has_been_full)
                self._add_model(model).limit = _set_ceiling(limit, now) if stored.has_been_full else limit


_FIRST_GUESS = ParallelLimit()
