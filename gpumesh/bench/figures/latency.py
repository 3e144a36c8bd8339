"""Computes the latencies of a stage's requests. Pure. ``stats`` defines the terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.figures.answers.answer import Answer
from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.stats import NO_VALUES, SampleSummary, gaps_ms, summarize_sample


@dataclass(frozen=True, slots=True)
class Latency:
    """The latencies of a stage's served requests, in ms. ``server_load`` is the server's own time to load the model.

    ``Coverage`` tells which clock ``tpot`` comes from.
    """

    ttft: SampleSummary
    tpot: SampleSummary
    itl: SampleSummary
    end_to_end: SampleSummary
    server_load: SampleSummary
    outside_server: SampleSummary
    """End-to-end minus the server's own total: the network, our own code, and every queue in front of the server."""
    server_wait: SampleSummary = NO_VALUES
    """The server's own total minus its load, prompt and generation: the queue inside the server."""


def latency_of(served: Sequence[Answer]) -> Latency:
    """Summarizes the latencies of the served requests."""
    return Latency(
        ttft=summarize_sample(answer.record.ttft_ms for answer in served),
        tpot=summarize_sample(answer.tpot_ms for answer in served),
        itl=summarize_sample(gap for answer in served for gap in gaps_ms(answer.record.arrivals_s)),
        end_to_end=summarize_sample(answer.record.end_to_end_ms for answer in served),
        server_load=summarize_sample(answer.counters.load_ms for answer in served),
        outside_server=summarize_sample(outside_server_ms(answer.record) for answer in served),
        server_wait=summarize_sample(answer.counters.waited_ms for answer in served),
    )


def outside_server_ms(record: LoadSample) -> float | None:
    """The part of a request's time that the server did not count as its own, in ms, from the moment it was sent.

    ``None`` if the server gave no total time.
    """
    server_ms = record.counters.total_ms if record.counters else None
    return None if server_ms is None else (record.ended_s - record.sent_s) * 1000.0 - server_ms
