"""Computes the rates of a stage: tokens, requests and good requests per second. Pure. ``stats`` defines the terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpumesh.bench.figures.answers.answer import Answer, longest_tpot_ms
from gpumesh.bench.figures.answers.token_counts import TokenCounts
from gpumesh.bench.figures.loaded_part import LoadedPart, answer_rate, token_rate
from gpumesh.bench.load.samples import SampleOutcome
from gpumesh.bench.stats import Objective, SampleSummary, rate, ratio, summarize_sample


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens and requests per second. A rate is ``None`` if one of the counts in it is unknown.

    ``server`` is the rate (tokens/s) of each answer by the server's clock. ``wall`` is the same rate by our clock, from
    the first piece to the last. The others are rates of the whole stage. ``good_share`` is the share of the requests
    that met the objectives, from 0 to 1.

    ``loaded_tokens_per_s``, ``loaded_requests_per_s`` and ``loaded_goodput_per_s`` are those of the part of a closed
    loop in which all slots were busy (``loaded_part.find_loaded_part``). ``ramp_s``, ``loaded_s`` and ``tail_s`` are
    the seconds before this part, of it, and after it. All six are ``None`` if there is no such part.
    """

    server: SampleSummary
    wall: SampleSummary
    output_tokens_per_s: float | None = None
    total_tokens_per_s: float | None = None
    requests_per_s: float | None = None
    goodput_per_s: float | None = None
    good_share: float | None = None
    loaded_tokens_per_s: float | None = None
    loaded_requests_per_s: float | None = None
    loaded_goodput_per_s: float | None = None
    ramp_s: float | None = None
    loaded_s: float | None = None
    tail_s: float | None = None

    @property
    def best_tokens_per_s(self) -> float | None:
        """The output rate that says what was measured: while all slots were busy, if there was such a part."""
        return self.output_tokens_per_s if self.loaded_tokens_per_s is None else self.loaded_tokens_per_s

    @property
    def best_requests_per_s(self) -> float | None:
        """The same for requests."""
        return self.requests_per_s if self.loaded_requests_per_s is None else self.loaded_requests_per_s

    @property
    def best_goodput_per_s(self) -> float | None:
        """The same for the requests that met the objectives."""
        return self.goodput_per_s if self.loaded_goodput_per_s is None else self.loaded_goodput_per_s


def rates_of(
    served: Sequence[Answer],
    output_tokens: int | None,
    prompt_tokens: int | None,
    *,
    seconds: float,
    judged: int,
    objective: Objective,
) -> Rates:
    """The rates of a stage, or of a route, that took ``seconds``. ``judged`` is the number of its requests of
    which it is known whether they met the objective: all but those that the end of the run cut off.

    ``output_tokens`` and ``prompt_tokens`` are those of the whole stage; ``None``: unknown.
    """
    good_count = _count_good(served, objective)
    total_tokens = None if output_tokens is None or prompt_tokens is None else output_tokens + prompt_tokens
    return Rates(
        server=summarize_sample(answer.counters.tokens_per_s for answer in served),
        wall=summarize_sample(ratio(1000.0, answer.arrival_tpot_ms) for answer in served),
        output_tokens_per_s=_rate_of(output_tokens, seconds),
        total_tokens_per_s=_rate_of(total_tokens, seconds),
        requests_per_s=rate(len(served), seconds),
        goodput_per_s=_rate_of(good_count, seconds),
        good_share=good_count / judged if judged and good_count is not None else None,
    )


def with_loaded_rates(
    rates: Rates,
    answers: Sequence[Answer],
    loaded: LoadedPart | None,
    token_counts: TokenCounts,
    *,
    duration_s: float,
    objective: Objective,
) -> Rates:
    """The rates of a stage that took ``duration_s``, with those of the part in which all slots were busy."""
    if loaded is None:
        return rates
    return replace(
        rates,
        loaded_tokens_per_s=token_rate(answers, loaded, token_counts),
        loaded_requests_per_s=answer_rate(answers, loaded, counts=lambda _: True),
        loaded_goodput_per_s=answer_rate(answers, loaded, counts=lambda answer: meets_objective(answer, objective)),
        ramp_s=loaded.start_s,
        loaded_s=loaded.seconds,
        tail_s=duration_s - loaded.end_s,
    )


def _rate_of(amount: float | None, seconds: float) -> float | None:
    """The amount per second; ``None`` if the amount is unknown."""
    return None if amount is None else rate(amount, seconds)


def _count_good(served: Sequence[Answer], objective: Objective) -> int | None:
    """How many answers count for goodput; ``None`` if it is unknown for one of them."""
    decisions = [meets_objective(answer, objective) for answer in served]
    return None if None in decisions else decisions.count(True)


def meets_objective(answer: Answer, objective: Objective) -> bool | None:
    """Whether the request counts for goodput; ``None`` if it is unknown.

    An answer of one token has no TPOT, so only its TTFT matters. A request that was not served, or whose TTFT is
    unknown, does not count.
    """
    ttft, tpot = answer.record.ttft_ms, answer.tpot_ms
    if answer.record.outcome is not SampleOutcome.SERVED or ttft is None or ttft > objective.ttft_ms:
        return False
    if tpot is not None or not answer.lacks_tpot:
        return tpot is None or tpot <= objective.tpot_ms
    longest_ms = longest_tpot_ms(answer.record)
    return True if longest_ms is not None and longest_ms <= objective.tpot_ms else None
