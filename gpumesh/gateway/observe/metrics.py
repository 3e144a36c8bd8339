"""The metrics of requests for Prometheus: counters and histograms by route, node and model.

No client can make the metrics grow without bound. A model's name becomes a label only if a node lists the model or has
answered for it, and there are at most ``MAX_MODELS`` such labels. Each metric has at most ``MAX_SERIES`` series. All
other models and labels count as ``other``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import TypeVar

from gpumesh.backends.base import ServerCounters
from gpumesh.gateway.observe.exposition import Family, Labels, counter, histogram
from gpumesh.gateway.observe.record import RequestRecord
from gpumesh.text.model_names import full_name

T = TypeVar("T")

MAX_MODELS = 200
MAX_SERIES = 5000
MAX_SPELLINGS = 1000  # so many spellings of model names have their label in a cache
OTHER_LABEL = "other"
MIN_WAIT_S = 0.001  # a request that got no answer and was in the queue for a shorter time was refused at once

# Upper bounds of the buckets, in seconds.
# Until the first token: from a warm cache to a model of 70B that must be loaded.
TTFT_BOUNDS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0)
# For a token: from 400 tokens/s down to one token/s on a CPU.
TPOT_BOUNDS = (0.0025, 0.005, 0.0075, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.03, 0.04, 0.06, 0.1, 0.2, 0.4, 1.0)
# Of a whole request.
DURATION_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
# In the queue.
WAIT_BOUNDS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """A ``Distribution`` that counts values as they are observed. ``bounds``: the upper bounds of the buckets, in
    rising order."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts the value in the first bucket whose bound is not below the value. A value above all bounds counts in
        the last bucket."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class CounterValue:
    """A number that a ``LabeledSeries`` holds and that its users raise."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class ModelMetrics:
    """The metrics of one model on one node. They are one object, so that a request looks up its series once."""

    __slots__ = ("continuations", "duration", "output_tokens", "prompt_tokens", "tpot", "ttft")

    def __init__(self) -> None:
        self.duration = Histogram(DURATION_BOUNDS)
        self.ttft = Histogram(TTFT_BOUNDS)
        self.tpot = Histogram(TPOT_BOUNDS)
        self.output_tokens = 0
        self.prompt_tokens = 0
        self.continuations = 0


class LabeledSeries(dict[tuple[str, ...], T]):
    """Values by their labels; a value is created when its labels are first used. Once there are ``bound`` series, all
    new labels share one further series, whose labels are all ``other``.

    ``names`` are the labels' names, and ``create`` makes a new value."""

    def __init__(self, names: tuple[str, ...], create: Callable[[], T], bound: int = MAX_SERIES) -> None:
        super().__init__()
        self._names = names
        self._create = create
        self._bound = bound

    def __missing__(self, labels: tuple[str, ...]) -> T:
        """Creates the value for new labels, whose values are in the order of ``names``. Beyond the bound, returns the
        value of the series ``other``, and creates it the first time."""
        if len(self) >= self._bound:
            labels = (OTHER_LABEL,) * len(self._names)
        return self.setdefault(labels, self._create())

    def named(self) -> Iterator[tuple[Labels, T]]:
        """Yields the labels as pairs of name and value, then the value of the series."""
        for labels, value in self.items():
            yield tuple(zip(self._names, labels, strict=True)), value


class RequestMetrics:
    """The metrics of all requests of a gateway. ``add`` is called once for each request, at its end, and costs some
    microseconds. ``lists_model`` returns whether any node lists a model."""

    def __init__(self, lists_model: Callable[[str], bool] = lambda _: False) -> None:
        self._lists_model = lists_model
        self.requests = LabeledSeries(("route", "node", "model", "outcome", "code"), CounterValue)
        self.models = LabeledSeries(("node", "model"), ModelMetrics)
        self.queue_wait = LabeledSeries(("priority",), lambda: Histogram(WAIT_BOUNDS))
        self._models: set[str] = set()  # the full names of models that have a label
        self._labels: dict[str, str] = {}  # by the name as a client spells it

    def add(self, record: RequestRecord) -> None:
        """Counts a request that has ended. Only a request that needed a slot adds to durations and tokens."""
        answer, demand = record.answer, record.demand
        outcome = "" if record.outcome is None else record.outcome
        code = str(record.status)
        if answer is None or demand is None:
            self._add_unanswered(record, outcome, code)
            return
        node = answer.node
        model = self.model_label(demand.model, answered=answer.status < 400)
        self.requests[record.route, node, model, outcome, code].value += 1
        if not demand.needs_slot:  # no inference, but for example a question about a model
            return
        metrics = self.models[node, model]
        metrics.duration.observe(record.ended_at - record.started_at)
        metrics.continuations += answer.continuations
        priority_label = (demand.priority,)
        self.queue_wait[priority_label].observe(answer.queue_ms / 1000.0)
        first_byte_at = record.first_byte_at if answer.body is None else None  # only a stream shows when tokens come
        if first_byte_at is not None:
            first_node = record.node or node  # after a continuation ``node`` is another one
            self.models[first_node, model].ttft.observe(first_byte_at - record.started_at)
        if answer.counters is not None:
            _add_tokens(metrics, answer.counters, first_byte_at, record.ended_at)

    def _add_unanswered(self, record: RequestRecord, outcome: str, code: str) -> None:
        """Counts a request that got no answer of a node: for the node that got it last, and the model that it asked
        for. A request that no node got, for a model that is not known, has neither label."""
        demand, progress = record.demand, record.progress
        node = progress.node or ""
        model = "" if demand is None else self.model_label(demand.model, answered=False)
        is_unknown = model == OTHER_LABEL and not node  # refused at once, because no node has the model
        if is_unknown:
            model = ""
        self.requests[record.route, node, model, outcome, code].value += 1
        if demand is not None and demand.needs_slot and not is_unknown and progress.queue_s >= MIN_WAIT_S:
            self.queue_wait[demand.priority,].observe(progress.queue_s)

    def model_label(self, name: str | None, *, answered: bool) -> str:
        """The label of a model: the same for all spellings of its name; empty for a request without a model. The label
        is ``other`` for a model for which no node has ever answered and that no node lists, and for a new model once
        there are ``MAX_MODELS`` labels. ``answered``: a node has answered this request without an error."""
        if name is None:
            return ""
        label = self._labels.get(name)
        if label is not None:
            return label
        label = full_name(name)
        if label not in self._models:
            is_known = len(self._models) < MAX_MODELS and (answered or self._lists_model(name))
            if not is_known:
                return OTHER_LABEL
            self._models.add(label)
        if len(self._labels) < MAX_SPELLINGS:
            self._labels[name] = label
        return label

    def _histograms(self, select: Callable[[ModelMetrics], Histogram]) -> dict[Labels, Histogram]:
        """The histogram that ``select`` takes from the metrics of each model, by the model's labels. Leaves out empty
        histograms."""
        histograms = ((labels, select(metrics)) for labels, metrics in self.models.named())
        return {labels: histogram for labels, histogram in histograms if any(histogram.counts)}

    def _totals(self, select: Callable[[ModelMetrics], int]) -> Iterator[tuple[Labels, float]]:
        """Yields for each model its labels and the counter that ``select`` takes from its metrics. Leaves out counters
        that are 0."""
        for labels, metrics in self.models.named():
            total = select(metrics)
            if total > 0:
                yield labels, total

    def families(self) -> Iterator[Family]:
        """All metrics of requests, for the page of metrics."""
        yield counter(
            "gpumesh_requests_total",
            "Requests to the gateway that have ended, by how they did; code is the HTTP status (0: nothing was sent).",
            ((labels, total.value) for labels, total in self.requests.named()),
        )
        yield histogram(
            "gpumesh_request_duration_seconds",
            "From a request's head to the end of its answer, queue included; inference only.",
            DURATION_BOUNDS,
            self._histograms(lambda metrics: metrics.duration),
        )
        yield histogram(
            "gpumesh_time_to_first_token_seconds",
            "From a request's head to the first bytes of its streamed answer, queue included.",
            TTFT_BOUNDS,
            self._histograms(lambda metrics: metrics.ttft),
        )
        yield histogram(
            "gpumesh_time_per_output_token_seconds",
            "Mean time of a token after the first; of an answer in one piece by the server's own clock.",
            TPOT_BOUNDS,
            self._histograms(lambda metrics: metrics.tpot),
        )
        yield histogram(
            "gpumesh_queue_wait_seconds",
            "Time that requests waited in the gateway for a place on a node.",
            WAIT_BOUNDS,
            dict(self.queue_wait.named()),
        )
        yield counter(
            "gpumesh_output_tokens_total",
            "Tokens generated, by the servers' own counters.",
            self._totals(lambda metrics: metrics.output_tokens),
        )
        yield counter(
            "gpumesh_prompt_tokens_total",
            "Tokens of prompts, by the servers' own counters.",
            self._totals(lambda metrics: metrics.prompt_tokens),
        )
        yield counter(
            "gpumesh_continuations_total",
            "Answers that were cut and that another node went on with.",
            self._totals(lambda metrics: metrics.continuations),
        )


def _add_tokens(metrics: ModelMetrics, counters: ServerCounters, first_byte_at: float | None, ended_at: float) -> None:
    """Counts the tokens of an answer, and observes the mean time of a token. ``first_byte_at`` is ``None`` for an
    answer in one piece: then the server's own duration is used, if it gives one."""
    metrics.prompt_tokens += counters.prompt_tokens or 0
    tokens = counters.tokens
    if not tokens:
        return
    metrics.output_tokens += tokens
    if first_byte_at is not None:
        if tokens > 1:  # the first token came at ``first_byte_at``, the others after it
            metrics.tpot.observe((ended_at - first_byte_at) / (tokens - 1))
    elif counters.eval_ms:
        metrics.tpot.observe(counters.eval_ms / 1000.0 / tokens)
