"""Computes the rates of a stage: tokens, requests and good requests per second. Pure. ``stats`` defines the terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpumesh.bench.figures.latency import request_tpot_ms
from gpumesh.bench.figures.loaded_part import LoadedPart, answer_rate, token_rate
from gpumesh.bench.load.samples import LoadSample, SampleOutcome
from gpumesh.bench.stats import Objective, SampleSummary, rate, summarize_sample


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens and requests per second.

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
    served: Sequence[LoadSample],
    output_tokens: int,
    prompt_tokens: int,
    *,
    seconds: float,
    sent: int,
    objective: Objective,
) -> Rates:
    """The rates of a stage, or of a route, that took ``seconds``. ``sent`` is the number of all its requests."""
    good_count = sum(meets_objective(record, objective) for record in served)
    return Rates(
        server=summarize_sample(record.counters.tokens_per_s if record.counters else None for record in served),
        wall=summarize_sample(_wall_rate(record) for record in served),
        output_tokens_per_s=rate(output_tokens, seconds),
        total_tokens_per_s=rate(output_tokens + prompt_tokens, seconds),
        requests_per_s=rate(len(served), seconds),
        goodput_per_s=rate(good_count, seconds),
        good_share=good_count / sent if sent else None,
    )


def with_loaded_rates(
    rates: Rates,
    records: Sequence[LoadSample],
    loaded: LoadedPart | None,
    *,
    duration_s: float,
    objective: Objective,
) -> Rates:
    """The rates of a stage that took ``duration_s``, with those of the part in which all slots were busy."""
    if loaded is None:
        return rates
    return replace(
        rates,
        loaded_tokens_per_s=token_rate(records, loaded),
        loaded_requests_per_s=answer_rate(records, loaded, counts=lambda _: True),
        loaded_goodput_per_s=answer_rate(records, loaded, counts=lambda record: meets_objective(record, objective)),
        ramp_s=loaded.start_s,
        loaded_s=loaded.seconds,
        tail_s=duration_s - loaded.end_s,
    )


def meets_objective(record: LoadSample, objective: Objective) -> bool:
    """Whether the request counts for goodput. An answer of one token has no TPOT, so only its TTFT matters.

    A request that was not served, or whose TTFT is unknown, does not count.
    """
    ttft, tpot = record.ttft_ms, request_tpot_ms(record)
    if record.outcome is not SampleOutcome.SERVED or ttft is None or ttft > objective.ttft_ms:
        return False
    return tpot is None or tpot <= objective.tpot_ms


def _wall_rate(record: LoadSample) -> float | None:
    """The tokens/s of one answer by our own clock. ``None`` if its TPOT is unknown or 0."""
    tpot = request_tpot_ms(record)
    return 1000.0 / tpot if tpot else None
