"""Decides what is known of one answer: its tokens, the server's durations, its TPOT. Pure.

A server may leave out a figure, or give one that contradicts what was seen here. Such a figure is unknown (``None``),
and the answer says so. ``docs/bench.md`` has the rules for people.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from msgspec.structs import replace

from gpumesh.backends.base import FASTEST_TOKENS_PER_S, ServerCounters
from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.stats import tpot_ms

# A duration of the server may be longer than the same time on our clock by this share and by so many ms: two clocks,
# and the sleeps of two event loops.
CLOCK_TOLERANCE, CLOCK_TOLERANCE_MS = 0.02, 5.0
# A server generates a token before we receive it. So its generation may be shorter than the time between our first and
# last piece only by what the way and our own event loop add: if it is more than this share and so many ms, the server's
# clock is not believed.
MAX_ADDED_SHARE, MAX_ADDED_MS = 0.1, 20.0
# With so many of the tokens received as pieces of their own, a piece is one token: the end of the answer is a token
# without text, and some characters take two tokens.
MIN_PIECES_PER_TOKEN = 0.98


NO_COUNTERS = ServerCounters()


class TpotSource(StrEnum):
    """Which clock an answer's TPOT comes from."""

    SERVER = "server"
    """The server's own duration of the generation, and its count of tokens."""
    ARRIVALS = "arrivals"
    """The arrival times of the pieces here, and the server's count of tokens."""


class Hidden(StrEnum):
    """Why an answer has fewer pieces than tokens."""

    NOTHING = "nothing"
    """It has not: each piece is one token."""
    LARGE_PIECES = "large-pieces"
    """The server puts several tokens into a piece."""
    TOKENS = "tokens"
    """The server counts tokens that it does not send, such as those of its thinking."""
    UNKNOWN = "unknown"
    """One of these two."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of one answer. A figure that is not known, or not believed, is ``None``.

    ``record`` is the request's outcome, with the server's counts and durations as far as they are believed.
    ``contradicted``: the server's durations do not fit what was seen here, so ``record`` has none of them. ``hidden``
    says why there are fewer pieces than tokens. ``tpot_ms`` is ``None`` also for an answer of one token, which has no
    TPOT. ``arrival_tpot_ms`` is the TPOT by our own clock, whatever the server says.
    """

    record: LoadSample
    hidden: Hidden
    tpot_ms: float | None
    tpot_source: TpotSource | None
    arrival_tpot_ms: float | None
    contradicted: bool = False

    @property
    def counters(self) -> ServerCounters:
        """The server's figures, as far as they are believed."""
        return self.record.counters or NO_COUNTERS

    @property
    def tokens(self) -> int | None:
        """The server's count of the answer's tokens."""
        return self.record.tokens

    @property
    def pieces(self) -> int:
        """How many pieces with text arrived."""
        return len(self.record.arrivals_s)

    @property
    def held_up(self) -> bool:
        """Whether the pieces took much longer to arrive than the server says that it took to generate them."""
        arrivals_s, eval_ms = self.record.arrivals_s, self.counters.eval_ms
        if eval_ms is None or not arrivals_s:
            return False
        span_ms = (arrivals_s[-1] - arrivals_s[0]) * 1000.0
        return eval_ms < (1.0 - MAX_ADDED_SHARE) * span_ms - MAX_ADDED_MS

    @property
    def has_count_and_pieces(self) -> bool:
        """Whether the number of pieces can be compared with the number of tokens."""
        return self.tokens is not None and self.pieces > 0

    @property
    def lacks_tpot(self) -> bool:
        """Whether the answer has a TPOT, and the TPOT is unknown."""
        has_several = self.pieces > 1 if self.tokens is None else self.tokens > 1
        return has_several and self.tpot_ms is None


def read_answers(records: Sequence[LoadSample]) -> list[Answer]:
    """Decides what is known of the answers of these requests, in their order.

    A clock that is too slow or too fast is found by the majority of a node's answers in a stage, because a single
    answer can be held up on its way.
    """
    answers = [_read_alone(record) for record in records]
    by_node: dict[tuple[str, str | None], list[Answer]] = {}
    for answer in answers:
        if answer.counters.eval_ms is not None and answer.pieces > 1:
            by_node.setdefault((answer.record.stage, answer.record.node), []).append(answer)
    wrong_clocks = {key for key, compared in by_node.items() if _is_clock_wrong(compared)}
    return [
        _without_durations(answer) if (answer.record.stage, answer.record.node) in wrong_clocks else answer
        for answer in answers
    ]


def _is_clock_wrong(answers: Sequence[Answer]) -> bool:
    """Whether most of these answers took much longer, or much shorter, than the server says."""
    slow = sum(answer.held_up for answer in answers)
    fast = sum(_is_too_short_for(answer) for answer in answers)
    return 2 * max(slow, fast) > len(answers)


def _is_too_short_for(answer: Answer) -> bool:
    """Whether the tokens arrived one by one in much less time than the server says that it took to generate them.

    If all of this time fits before the first piece, the answer may have been held back on the way: that is no fault of
    the clock.
    """
    counters, record = answer.counters, answer.record
    if counters.eval_ms is None or answer.tokens is None or answer.hidden is not Hidden.NOTHING:
        return False
    # Some servers also count the time of the first token.
    least_ms = counters.eval_ms * (answer.tokens - 1) / answer.tokens
    span_ms = (record.arrivals_s[-1] - record.arrivals_s[0]) * 1000.0
    before_ms = (record.arrivals_s[0] - record.sent_s) * 1000.0
    return least_ms > (1.0 + MAX_ADDED_SHARE) * span_ms + MAX_ADDED_MS and _is_longer(counters.eval_ms, before_ms)


def read_answer(record: LoadSample) -> Answer:
    """Decides what is known of one answer, without others to compare it with."""
    (answer,) = read_answers([record])
    return answer


def _read_alone(record: LoadSample) -> Answer:
    counters = replace(record.counters or NO_COUNTERS, tokens=record.tokens, prompt_tokens=record.prompt_tokens)
    counters = _believe_count(record, counters)
    answer = _make_answer(record, counters)
    return _without_durations(answer) if _contradicts(record, counters) else answer


def _make_answer(record: LoadSample, counters: ServerCounters) -> Answer:
    hidden = _find_hidden(record, counters)
    arrival_tpot = _find_arrival_tpot(record, counters.tokens, hidden)
    tpot, source = _find_tpot(counters, arrival_tpot)
    believed = dataclasses.replace(record, counters=counters, tokens=counters.tokens)
    return Answer(believed, hidden, tpot, source, arrival_tpot)


def _without_durations(answer: Answer) -> Answer:
    """The answer without the durations of the server, which are not believed."""
    counters = replace(answer.counters, total_ms=None, load_ms=None, prompt_ms=None, eval_ms=None)
    made = _make_answer(answer.record, counters)
    return dataclasses.replace(made, contradicted=made.contradicted or counters != answer.counters)


def _believe_count(record: LoadSample, counters: ServerCounters) -> ServerCounters:
    """The counters, without a count of tokens that cannot be: fewer than pieces, or more than any hardware makes.

    A piece holds at least a token. One or two pieces more are possible: a server may split a token at the end of the
    thinking.
    """
    tokens, pieces = counters.tokens, len(record.arrivals_s)
    seconds = record.ended_s - record.sent_s
    if tokens is None:
        return counters
    is_too_low = tokens < (1.0 - MAX_ADDED_SHARE) * pieces - 2
    is_too_high = tokens > FASTEST_TOKENS_PER_S * max(seconds, 0.0) + pieces
    return replace(counters, tokens=None) if is_too_low or is_too_high else counters


def _contradicts(record: LoadSample, counters: ServerCounters) -> bool:
    """Whether the server's durations cannot be true beside the times that were seen here."""
    request_ms = (record.ended_s - record.sent_s) * 1000.0
    parts_ms = sum(value or 0.0 for value in (counters.load_ms, counters.prompt_ms, counters.eval_ms))
    if _is_longer(max(parts_ms, counters.total_ms or 0.0), request_ms):
        return True
    if counters.total_ms is not None and _is_longer(parts_ms, counters.total_ms):
        return True
    # A rate that no hardware reaches.
    has_rate = counters.eval_ms is not None and counters.tokens is not None and counters.tokens > 1
    return has_rate and counters.tokens_per_s is None


def _is_longer(duration_ms: float, bound_ms: float) -> bool:
    """Whether a duration is longer than its bound by more than two clocks may differ."""
    return duration_ms > bound_ms * (1.0 + CLOCK_TOLERANCE) + CLOCK_TOLERANCE_MS


def _find_hidden(record: LoadSample, counters: ServerCounters) -> Hidden:
    """Decides why an answer has fewer pieces than tokens, by the time that the missing tokens would have taken.

    If they were generated before the first piece, the server needed about as long for each of them as for a piece. If
    the answer's beginning was too short for that, they are in the pieces.
    """
    tokens, pieces = counters.tokens, len(record.arrivals_s)
    if tokens is None or pieces == 0:
        return Hidden.UNKNOWN
    if pieces >= MIN_PIECES_PER_TOKEN * tokens - 1:
        return Hidden.NOTHING
    if pieces == 1:
        return Hidden.UNKNOWN  # one piece has no gap to compare with
    gap_ms = _mean_gap_ms(record.arrivals_s)
    if counters.eval_ms is not None:  # the pieces' part of the generation: all of it, unless tokens are hidden
        pieces_ms = gap_ms * pieces
        return Hidden.TOKENS if pieces_ms < (1.0 - MAX_ADDED_SHARE) * counters.eval_ms else Hidden.LARGE_PIECES
    before_ms = (record.arrivals_s[0] - record.sent_s) * 1000.0
    return Hidden.LARGE_PIECES if before_ms < (tokens - pieces) * gap_ms else Hidden.UNKNOWN


def _find_tpot(counters: ServerCounters, arrival_tpot_ms: float | None) -> tuple[float | None, TpotSource | None]:
    """The TPOT in ms, and its source. Both are ``None`` if the TPOT is unknown, and for fewer than two tokens.

    The server's clock starts at its first token (llama-server, and so Ollama): its duration covers all tokens but one.
    """
    if counters.tokens is not None and counters.tokens > 1 and counters.eval_ms is not None:
        return counters.eval_ms / (counters.tokens - 1), TpotSource.SERVER
    return arrival_tpot_ms, None if arrival_tpot_ms is None else TpotSource.ARRIVALS


def _find_arrival_tpot(record: LoadSample, tokens: int | None, hidden: Hidden) -> float | None:
    """The TPOT by the arrival times, in ms. ``None`` if it is unknown, and for fewer than two tokens or pieces."""
    arrivals_s = record.arrivals_s
    if tokens is None or len(arrivals_s) < 2:
        return None
    tpot: float | None
    if hidden is Hidden.NOTHING:
        tpot = tpot_ms(record.ttft_ms, record.last_token_ms, tokens)
    elif hidden is Hidden.LARGE_PIECES:
        # The first piece has several tokens, too. It took about as long as those after it; the last one may be smaller.
        first_ms = _mean_gap_ms(arrivals_s[:-1] if len(arrivals_s) > 2 else arrivals_s)
        tpot = ((arrivals_s[-1] - arrivals_s[0]) * 1000.0 + first_ms) / tokens
    else:
        return None
    # No hardware is so fast: the pieces were held back on the way, and came at once.
    return tpot if tpot is not None and tpot * FASTEST_TOKENS_PER_S >= 1000.0 else None


def _mean_gap_ms(arrivals_s: Sequence[float]) -> float:
    """The mean time between two of at least two pieces, in ms."""
    return (arrivals_s[-1] - arrivals_s[0]) * 1000.0 / (len(arrivals_s) - 1)


def longest_tpot_ms(record: LoadSample) -> float | None:
    """The mean time between two pieces in ms: the TPOT is at most so long, because a piece is at least a token.

    ``None`` for fewer than two pieces.
    """
    return _mean_gap_ms(record.arrivals_s) if len(record.arrivals_s) > 1 else None
