from __future__ import annotations

import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.base import Demand, Priority
from gpumesh.balancer.outcomes import RequestOutcome
from gpumesh.gateway.observe.exposition import render
from gpumesh.gateway.observe.metrics import (
    MAX_MODELS,
    MAX_SERIES,
    MAX_SPELLINGS,
    OTHER_LABEL,
    CounterValue,
    Histogram,
    LabeledSeries,
    RequestMetrics,
)
from gpumesh.gateway.observe.record import RequestRecord
from gpumesh.mesh.requests.answer import Answer, WholeAnswer
from gpumesh.topology import BackendKind
from tests.gateway.fleet import metric

PLACE = {"node": "a", "model": "m:latest"}


class Streamed(Answer):
    """An answer that has streamed, with the counters that its final frame had."""

    def __init__(self, counters: ServerCounters | None, *, status: int = 200, node: str = "a") -> None:
        super().__init__(node, BackendKind.OLLAMA, status, ())
        self._counters = counters

    @property
    def counters(self) -> ServerCounters | None:
        return self._counters


def record(
    answer: Answer | None,
    *,
    model: str = "m",
    outcome: RequestOutcome = RequestOutcome.SERVED,
    status: int = 200,
    needs_slot: bool = True,
    first: float | None = 0.5,
    ended: float = 2.5,
) -> RequestRecord:
    request_record = RequestRecord(lambda: 0.0, 0.0, "POST", "/api/chat", "/api/chat")
    request_record.demand = Demand(model, priority=Priority.BATCH, needs_slot=needs_slot)
    request_record.node = None if answer is None else answer.node
    (
        request_record.answer,
        request_record.first_byte_at,
        request_record.ended_at,
        request_record.outcome,
        request_record.status,
    ) = answer, first, ended, outcome, status
    return request_record


def rendered(metrics: RequestMetrics) -> str:
    return render(metrics.families())


def test_a_streamed_answer_is_timed_by_its_tokens() -> None:
    metrics = RequestMetrics()
    answer = Streamed(ServerCounters(prompt_tokens=7, tokens=21))
    answer.queue_ms = 40.0
    answer.continuations = 1
    metrics.add(record(answer))
    text = rendered(metrics)
    labels = {"route": "/api/chat", "outcome": "served", "code": "200", **PLACE}
    assert metric(text, "gpumesh_requests_total", **labels) == 1
    assert metric(text, "gpumesh_time_to_first_token_seconds_sum", **PLACE) == 0.5
    assert metric(text, "gpumesh_time_per_output_token_seconds_sum", **PLACE) == pytest.approx(0.1)
    assert metric(text, "gpumesh_request_duration_seconds_sum", **PLACE) == 2.5
    assert metric(text, "gpumesh_queue_wait_seconds_sum", priority="batch") == pytest.approx(0.04)
    assert metric(text, "gpumesh_output_tokens_total", **PLACE) == 21
    assert metric(text, "gpumesh_prompt_tokens_total", **PLACE) == 7
    assert metric(text, "gpumesh_continuations_total", **PLACE) == 1


def test_a_continued_answer_counts_for_its_last_node_and_its_ttft_for_the_first() -> None:
    metrics = RequestMetrics()
    request_record = record(Streamed(ServerCounters(tokens=21)))
    assert request_record.answer is not None
    request_record.answer.node = "b"
    metrics.add(request_record)
    text = rendered(metrics)
    assert metric(text, "gpumesh_time_to_first_token_seconds_count", node="a") == 1
    assert metric(text, "gpumesh_time_per_output_token_seconds_count", node="b") == 1
    assert metric(text, "gpumesh_output_tokens_total", node="b") == 21


def test_an_answer_in_one_piece_is_timed_by_the_servers_clock() -> None:
    metrics = RequestMetrics()
    counters = ServerCounters(tokens=10, eval_ms=500.0)
    metrics.add(record(WholeAnswer("a", BackendKind.OLLAMA, 200, (), b"{}", counters)))
    text = rendered(metrics)
    assert metric(text, "gpumesh_time_per_output_token_seconds_sum", **PLACE) == pytest.approx(0.05)
    assert metric(text, "gpumesh_time_to_first_token_seconds_count") == 0, "there was no first token to be seen"


def test_a_request_without_inference_is_counted_and_not_timed() -> None:
    metrics = RequestMetrics()
    metrics.add(record(WholeAnswer("a", BackendKind.OLLAMA, 200, (), b"{}"), needs_slot=False))
    assert metric(rendered(metrics), "gpumesh_requests_total", **PLACE) == 1
    assert metric(rendered(metrics), "gpumesh_request_duration_seconds_count") == 0


def test_a_request_that_no_node_got_has_no_node_label() -> None:
    metrics = RequestMetrics()
    metrics.add(record(None, outcome=RequestOutcome.REFUSED, status=404))
    metrics.add(record(None, outcome=RequestOutcome.CANCELLED, status=499))
    text = rendered(metrics)
    assert metric(text, "gpumesh_requests_total", node="", model="", outcome="refused", code="404") == 1
    assert metric(text, "gpumesh_requests_total", node="", model="", outcome="cancelled", code="499") == 1


def test_all_spellings_of_a_model_have_one_label() -> None:
    metrics = RequestMetrics()
    for name in ("m", "M", "m:latest", " M:Latest "):
        metrics.add(record(Streamed(None), model=name))
    assert metric(rendered(metrics), "gpumesh_requests_total", **PLACE) == 4


def test_a_client_that_makes_up_names_adds_no_label() -> None:
    """A node answered 404 to each name; or a server accepts any name at all."""
    metrics = RequestMetrics()
    for number in range(10_000):
        metrics.add(record(Streamed(None, status=404), model=f"made-up-{number}", status=404))
    assert metric(rendered(metrics), "gpumesh_requests_total", model=OTHER_LABEL, code="404") == 10_000
    assert len(metrics.requests) == 1
    for number in range(10_000):
        metrics.add(record(Streamed(ServerCounters(tokens=3)), model=f"taken-{number}"))
    assert len(metrics.requests) <= MAX_MODELS + 2
    assert len(metrics._labels) <= MAX_SPELLINGS
    assert metric(rendered(metrics), "gpumesh_requests_total", model=OTHER_LABEL, code="200") == 10_000 - MAX_MODELS
    assert metric(rendered(metrics), "gpumesh_output_tokens_total") == 30_000, "nothing is lost"


def test_a_server_that_makes_up_statuses_is_bounded_too() -> None:
    series = LabeledSeries(("code",), CounterValue, bound=3)
    for number in range(100):
        series[str(number),].value += 1
    assert len(series) == 4
    assert MAX_SERIES > MAX_MODELS


def test_a_million_model_names_need_no_memory() -> None:
    metrics = RequestMetrics()
    request_record = record(Streamed(None, status=404), status=404)
    assert request_record.demand is not None

    def size() -> int:
        return sum(sys.getsizeof(part) for part in (metrics._labels, metrics._models, metrics.requests))

    metrics.add(request_record)
    before = size()
    for number in range(100_000):
        request_record.demand = Demand(f"{number}")
        metrics.add(request_record)
    assert size() == before


def test_a_histogram_counts_by_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.sum == 13.5


def test_names_are_as_prometheus_wants_them() -> None:
    """Base units, ``_total`` for what only grows, and one prefix."""
    metrics = RequestMetrics()
    metrics.add(record(Streamed(ServerCounters(tokens=2, prompt_tokens=1))))
    for family in text_string_to_metric_families(rendered(metrics)):
        assert family.name.startswith("gpumesh_")
        assert family.documentation.endswith(".")
        assert not family.name.endswith(("_ms", "_mib", "_percent", "_count"))
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
