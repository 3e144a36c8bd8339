"""Computes the rates of a stage: tokens, requests and good requests per second. Pure. ``stats`` defines the terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.figures.latency import request_tpot_ms
from gpumesh.bench.load.samples import LoadSample, SampleOutcome
from gpumesh.bench.stats import Objective, SampleSummary, rate, summarize_sample
from gpumesh.bench.workload.stages import Stage


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens and requests per second.

    ``server`` is the rate (tokens/s) of each answer by the server's clock. ``wall`` is the same rate by our clock, from
    the first piece to the last. The others are rates of the whole stage. ``good_share`` is the share of the requests
    that met the objectives, from 0 to 1.

    ``loaded_tokens_per_s`` is the output rate of a closed loop until its last request was sent. Until then every slot
    was taken. It leaves out the end of the stage, when the faster nodes are idle already.
    """

    server: SampleSummary
    wall: SampleSummary
    output_tokens_per_s: float | None = None
    total_tokens_per_s: float | None = None
    requests_per_s: float | None = None
    goodput_per_s: float | None = None
    good_share: float | None = None
    loaded_tokens_per_s: float | None = None


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


def loaded_rate(stage: Stage, records: Sequence[LoadSample]) -> float | None:
    """Computes ``Rates.loaded_tokens_per_s``. ``None`` for an open loop, and if all requests were sent at once."""
    if stage.concurrency is None or len(records) <= stage.concurrency:
        return None
    last_sent_s = max(record.sent_s for record in records)
    return rate(tokens_between(records, 0.0, last_sent_s), last_sent_s)


def tokens_between(records: Sequence[LoadSample], start_s: float, end_s: float) -> float:
    """The number of tokens that arrived from ``start_s`` to ``end_s`` (seconds of the stage).

    All pieces of an answer count as equal shares of the answer's tokens.
    """
    token_counts: list[float] = []
    for record in records:
        if record.arrivals_s:
            tokens_per_piece = (record.tokens or 0) / len(record.arrivals_s)
            pieces = sum(start_s <= arrival_s < end_s for arrival_s in record.arrivals_s)
            token_counts.append(tokens_per_piece * pieces)
    return math.fsum(token_counts)


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
