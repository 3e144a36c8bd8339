"""Learns how many requests of one model a server really runs in parallel (its slots). Pure.

Ollama never answers 503 because a GPU is busy: requests past ``OLLAMA_NUM_PARALLEL`` wait inside it, unseen. There are
two signs of how many slots it has:

- Answers that come at the same time: when ``k`` answers have begun and none of them has ended, there are ``k`` slots.
  This is known at the first token, while the answers still run.
- Durations: ``total - load - prompt_eval - eval`` in the final frame is the time that the request waited inside
  (docs/internals/ollama.md, "Queueing"). This is known only at the end, but also for answers that are not streamed.

The number is found as TCP finds the rate of a path (slow start, RFC 5681): twice the proven number of requests may be
sent, and the proven number grows with each first token, so it doubles in about the time of one first token. Once a
request has waited inside the server, only one request more than the proven number is tried at a time. When this request
waits too, the number is known. From then on one request more is tried at long intervals.

The number belongs to a model on a node: Ollama runs embedding models with one slot, whatever ``OLLAMA_NUM_PARALLEL``
is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

# On an idle server the time that no duration covers stays below the larger of NOISE_MS and NOISE_SHARE of the total.
NOISE_MS = 50.0
NOISE_SHARE = 0.05
# A shorter load_duration is no load: a model that is in memory reports some ms too.
LOAD_NOISE_MS = 200.0
# The proven number is the limit for at least this time and this number of answers. Then one request more is tried. So
# at most one request in 50 waits inside the server (sometimes a trial makes a second request wait).
CEILING_S = 300.0
CEILING_ANSWERS = 60
# A server that claims to run more requests together is not believed: its queue would be out of our control.
MOST_PROVEN = 512
# If answers are very short, another answer ends at about the time of each trial, so that no trial is clear. After this
# number of unclear trials in a row, a known number stays as it is until the next trial is due.
UNCLEAR_TRIALS = 4
# Many slots are given up in steps of this share, few slots one at a time: a restart with 4 slots instead of 32 is
# followed within a few answers.
SHRINK_SHARE = 1 / 8


class SlotSearch(StrEnum):
    """How far the search for the number of slots is."""

    DOUBLING = "doubling"
    """No request has waited inside the server yet: slow start."""
    STEPPING = "stepping"
    """Slow start went too far, or the server has become larger: one request more at a time is tried."""
    KNOWN = "known"
    """One request more than the proven number has waited."""


@dataclass(frozen=True, slots=True)
class ParallelLimit:
    """What is known about how many requests of one model a node runs in parallel.

    - ``proven``: the largest number of requests that ran together without waiting inside the server.
    - ``trials_left``: a trial is a request beyond ``proven``. This number of trials may still be sent before the
      result of one is known.
    - ``ceiling_until``: until this time (seconds of the caller's clock) no request may be sent beyond ``proven``,
      unless there are trials left. ``None``: not all trials have been sent yet.
    - ``answers_below_ceiling``: the answers since the ceiling was set, counted up to ``CEILING_ANSWERS``.
    - ``unclear_trials``: the trials in a row that proved nothing, because a slot may have become free just before.
    """

    proven: int = 1
    trials_left: int = 1
    search: SlotSearch = SlotSearch.DOUBLING
    ceiling_until: float | None = None
    answers_below_ceiling: int = 0
    unclear_trials: int = 0

    @property
    def has_been_full(self) -> bool:
        """Whether a request has waited inside the server. Before that, each first token may make the number larger."""
        return self.search is not SlotSearch.DOUBLING

    def max_in_flight(self, now: float) -> int:
        """The most requests that may be in flight now. During slow start it is twice the proven number. Later it is the
        proven number, or one more when a trial is due."""
        if self.trials_left > 0:
            return 2 * self.proven if self.search is SlotSearch.DOUBLING else self.proven + 1
        return self.proven + 1 if self._is_retry_due(now) else self.proven

    def _is_retry_due(self, now: float) -> bool:
        """Whether one request more may be tried, because enough time has passed, and enough answers have come, since
        the ceiling was set."""
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
    burst_is_complete: bool = True,
    trials: int = 1,
    streamed: bool = False,
) -> ParallelLimit:
    """Returns the limit after one answer.

    - ``waited_ms`` is the part of ``total_ms`` in which the request waited inside the server, ``load_ms`` the time for
      which it waited until the model was loaded. All are the server's own durations, ``None`` if the server gave none.
    - ``concurrent``: the requests of this model that were in flight on the node when this request was sent, this
      request and the requests of its burst included. (The burst are the requests that were sent in the same moment:
      they may have reached the server first.)
    - ``overlapping``: how many of these requests, this one included, surely ran together with it; ``None``: all.
    - ``burst_is_complete``: all answers of the burst have ended. ``trials``: the requests of the burst that were sent
      beyond the proven number.
    - ``streamed``: ``on_first_token`` was called for this answer. ``now`` is in seconds.

    An answer that waited for a load shows nothing about slots: while it waited, the requests before it may have ended.
    """
    limit = _count_answer(limit)
    waited_for_load = load_ms is not None and load_ms > LOAD_NOISE_MS
    has_durations = _is_duration(waited_ms) and _is_duration(total_ms)
    # mypy needs the first two tests; ``has_durations`` is false in these cases too.
    if waited_ms is None or total_ms is None or waited_for_load or not has_durations:
        # The durations show nothing. If the answer was streamed and needed no load, its first token has counted
        # already. Any other answer has shown nothing, so the trials of its burst may be sent once more.
        shows_nothing = burst_is_complete and (waited_for_load or not streamed)
        return return_trials(limit, trials, concurrent=concurrent) if shows_nothing else limit
    if waited_ms > max(NOISE_MS, NOISE_SHARE * total_ms):
        if concurrent > limit.proven:
            return _stop_growth(limit, concurrent, now)
        return _shrink(limit, now - total_ms / 1000.0, now)
    # A wait above NOISE_MS is within the noise of a long answer. But the request may also have waited for the end of
    # another answer, so it proves nothing.
    if waited_ms > NOISE_MS:
        return limit
    overlapping = concurrent if overlapping is None else overlapping
    if overlapping > limit.proven:
        return _grow(limit, overlapping)
    is_unclear = burst_is_complete and concurrent > limit.proven
    return _repeat_trials(limit, trials, concurrent, now) if is_unclear else limit


def return_trials(limit: ParallelLimit, trials: int = 1, *, concurrent: int) -> ParallelLimit:
    """Returns the limit after requests that have ended and have shown nothing: their clients have gone, or they failed.
    ``trials``: the largest number of these requests that can have been trials. As many new trials may be sent.
    ``concurrent``: the requests of the model in flight when these requests were sent, these included."""
    if concurrent <= limit.proven:  # no request was beyond the proven number, so none of them was a trial
        return limit
    trials_left = min(limit.trials_left + trials, count_new_trials(limit.search, limit.proven))
    return replace(limit, trials_left=trials_left)


def _repeat_trials(limit: ParallelLimit, trials: int, concurrent: int, now: float) -> ParallelLimit:
    """The limit after trials that have not waited, but may have got the slots of answers that had just ended."""
    unclear_trials = limit.unclear_trials + 1
    if limit.search is SlotSearch.KNOWN and unclear_trials >= UNCLEAR_TRIALS:
        return set_ceiling(limit, now)
    return replace(return_trials(limit, trials, concurrent=concurrent), unclear_trials=unclear_trials)


def count_new_trials(search: SlotSearch, proven: int) -> int:
    """How many requests may be tried beyond this proven number."""
    return proven if search is SlotSearch.DOUBLING else 1


def _grow(limit: ParallelLimit, proven: int) -> ParallelLimit:
    """The limit with this proven number and new trials; the limit as it is if the number is not larger."""
    proven = min(proven, MOST_PROVEN)
    if proven <= limit.proven:
        return limit
    search = SlotSearch.DOUBLING if limit.search is SlotSearch.DOUBLING else SlotSearch.STEPPING
    return ParallelLimit(proven, count_new_trials(search, proven), search)


def _stop_growth(limit: ParallelLimit, concurrent: int, now: float) -> ParallelLimit:
    """The limit after a request beyond the proven number has waited. If only one request more than the proven number
    was in flight, the number is known. Otherwise slow start has gone too far: from now on one request more at a time is
    tried."""
    if concurrent == limit.proven + 1:
        return set_ceiling(limit, now)
    if limit.search is SlotSearch.DOUBLING:
        return ParallelLimit(limit.proven, trials_left=1, search=SlotSearch.STEPPING)
    return limit


def set_ceiling(limit: ParallelLimit, now: float) -> ParallelLimit:
    """The limit when the proven number is known to be the number of slots."""
    return ParallelLimit(limit.proven, trials_left=0, search=SlotSearch.KNOWN, ceiling_until=now + CEILING_S)


def _shrink(limit: ParallelLimit, sent_at: float, now: float) -> ParallelLimit:
    """The limit after a request within the proven number has waited: the server was restarted with fewer slots, or
    other clients use it.

    Requests that were sent together wait together, but the limit shrinks only once for all of them: a request that was
    sent before the ceiling was set shows nothing new.
    """
    ceiling_set_at = -math.inf if limit.ceiling_until is None else limit.ceiling_until - CEILING_S
    if sent_at < ceiling_set_at:
        return limit
    step = max(int(limit.proven * SHRINK_SHARE), 1)
    return set_ceiling(replace(limit, proven=max(limit.proven - step, 1)), now)


def _count_answer(limit: ParallelLimit) -> ParallelLimit:
    """Counts an answer since the ceiling was set, up to the number from which it makes no difference."""
    if limit.ceiling_until is None or limit.answers_below_ceiling >= CEILING_ANSWERS:
        return limit
    return replace(limit, answers_below_ceiling=limit.answers_below_ceiling + 1)


def _is_duration(value: float | None) -> bool:
    """Whether this figure of a server can be a duration: not ``None``, NaN, infinite or negative."""
    return value is not None and math.isfinite(value) and value >= 0.0
