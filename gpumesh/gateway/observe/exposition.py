"""Renders metrics in Prometheus's text format, version 0.0.4. Pure.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MAX_LABEL_CHARS = 300  # of a label's value; the rest is cut off

Labels = tuple[tuple[str, str], ...]
"""Pairs of name and value."""


class MetricKind(StrEnum):
    """The types of metrics, by the names that the format has for them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class MetricSample:
    """One value with its labels. ``suffix`` follows the family's name: ``_bucket``, ``_sum`` or ``_count`` in a
    histogram."""

    labels: Labels
    value: float
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric with all its samples. A counter's ``name`` ends with ``_total``."""

    name: str
    kind: MetricKind
    help: str
    samples: tuple[MetricSample, ...]


class Distribution(Protocol):
    """The state of a histogram. ``counts`` has the number of values in each bucket: one bucket for each bound, and one
    for values beyond the last bound. ``sum`` is the sum of all values."""

    @property
    def counts(self) -> Sequence[int]: ...

    @property
    def sum(self) -> float: ...


def gauge(name: str, text: str, samples: Iterable[tuple[Labels, float | None]]) -> Family:
    """A gauge with a sample for each known value; a value of ``None`` is left out. If several samples have the same
    labels, only the last is used, because Prometheus refuses a whole page that has a series twice."""
    by_labels = {labels: value for labels, value in samples if value is not None}
    return Family(
        name, MetricKind.GAUGE, text, tuple(MetricSample(labels, value) for labels, value in by_labels.items())
    )


def counter(name: str, text: str, samples: Iterable[tuple[Labels, float]]) -> Family:
    """A counter. If several samples have the same labels, only the last is used, as in ``gauge``."""
    by_labels = dict(samples)
    return Family(
        name, MetricKind.COUNTER, text, tuple(MetricSample(labels, value) for labels, value in by_labels.items())
    )


def histogram(name: str, text: str, bounds: Sequence[float], series: Mapping[Labels, Distribution]) -> Family:
    """A histogram. ``bounds`` are the upper bounds of the buckets, ``series`` the distributions by their labels. In
    this format the sample of a bucket counts all values up to its bound ``le``, also those of the smaller buckets."""
    samples: list[MetricSample] = []
    for labels, distribution in series.items():
        values_so_far = 0
        for bound, count in zip((*bounds, float("inf")), distribution.counts, strict=True):
            values_so_far += count
            samples.append(MetricSample((*labels, ("le", _render_number(bound))), values_so_far, "_bucket"))
        samples += [MetricSample(labels, distribution.sum, "_sum"), MetricSample(labels, values_so_far, "_count")]
    return Family(name, MetricKind.HISTOGRAM, text, tuple(samples))


def render(families: Iterable[Family]) -> str:
    """The text that Prometheus reads. A family without samples is left out."""
    return "".join(line for family in families for line in _render_family(family))


def _render_family(family: Family) -> Iterator[str]:
    """Yields the two comment lines of the family, then a line for each sample."""
    if not family.samples:
        return
    yield f"# HELP {family.name} {_escape(family.help)}\n# TYPE {family.name} {family.kind.value}\n"
    for sample in family.samples:
        labels = [f'{name}="{_escape(value[:MAX_LABEL_CHARS], quoted=True)}"' for name, value in sample.labels]
        label_set = "{" + ",".join(labels) + "}" if labels else ""
        yield f"{family.name}{sample.suffix}{label_set} {_render_number(sample.value)}\n"


def _escape(text: str, *, quoted: bool = False) -> str:
    """The text with the escapes of the format. ``quoted``: the text stands in quotation marks, as a label's value
    does."""
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return escaped.replace('"', '\\"') if quoted else escaped


def _render_number(value: float) -> str:
    """The number as Prometheus reads it; whole numbers without a fraction."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    # Below 1e15 a float holds every whole number exactly.
    is_exact_integer = value == int(value) and abs(value) < 1e15
    return str(int(value)) if is_exact_integer else repr(float(value))
