"""Computes the latencies of a stage's requests. Pure. ``stats`` defines the terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.stats import SampleSummary, gaps_ms, summarize_sample, tpot_ms


@dataclass(frozen=True, slots=True)
class Latency:
    """The latencies of a stage's served requests, in ms. ``server_load`` is the server's own time to load the model."""

    ttft: SampleSummary
    tpot: SampleSummary
    itl: SampleSummary
    end_to_end: SampleSummary
    server_load: SampleSummary
    outside_server: SampleSummary
    """End-to-end minus the server's own total: the network, our own code, and every queue in front of the server."""


def latency_of(served: Sequence[LoadSample]) -> Latency:
    """Summarizes the latencies of the served requests."""
    return Latency(
        ttft=summarize_sample(record.ttft_ms for record in served),
        tpot=summarize_sample(request_tpot_ms(record) for record in served),
        itl=summarize_sample(gap for record in served for gap in gaps_ms(record.arrivals_s)),
        end_to_end=summarize_sample(record.end_to_end_ms for record in served),
        server_load=summarize_sample(record.counters.load_ms if record.counters else None for record in served),
        outside_server=summarize_sample(outside_server_ms(record) for record in served),
    )


def request_tpot_ms(record: LoadSample) -> float | None:
    """Computes the TPOT of one request in ms, up to its last token: the final frame has no text and does not count."""
    return tpot_ms(record.ttft_ms, record.last_token_ms, record.tokens)


def outside_server_ms(record: LoadSample) -> float | None:
    """The part of a request's time that the server did not count as its own, in ms, from the moment it was sent.

    ``None`` if the server gave no total time.
    """
    server_ms = record.counters.total_ms if record.counters else None
    if server_ms is None:
        return None
    return (record.ended_s - record.sent_s) * 1000.0 - server_ms
