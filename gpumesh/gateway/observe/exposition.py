"""Prometheus's text format, version 0.0.4: families of samples to text. Pure.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

LONGEST = 300  # characters of a label's value

Labels = tuple[tuple[str, str], ...]


class MetricKind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class MetricSample:
    """``suffix`` is what a histogram's parts have after the family's name."""

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
    """A histogram's state: ``counts`` has one place for each of ``bounds``, and one more for what is beyond."""

    @property
    def counts(self) -> Sequence[int]: ...

    @property
    def sum(self) -> float: ...


def gauge(name: str, text: str, samples: Iterable[tuple[Labels, float | None]]) -> Family:
    """What is unknown (``None``) has no sample. Of several with the same labels the last one stands: Prometheus takes
    nothing of a page that has a series twice."""
    known = {labels: value for labels, value in samples if value is not None}
    return Family(name, MetricKind.GAUGE, text, tuple(MetricSample(labels, value) for labels, value in known.items()))


def counter(name: str, text: str, samples: Iterable[tuple[Labels, float]]) -> Family:
    """Of several with the same labels the last one stands."""
    return Family(
        name, MetricKind.COUNTER, text, tuple(MetricSample(labels, value) for labels, value in dict(samples).items())
    )


def histogram(name: str, text: str, bounds: Sequence[float], series: Mapping[Labels, Distribution]) -> Family:
    samples: list[MetricSample] = []
    for labels, one in series.items():
        below = 0
        for bound, count in zip((*bounds, float("inf")), one.counts, strict=True):
            below += count
            samples.append(MetricSample((*labels, ("le", _number(bound))), below, "_bucket"))
        samples += [MetricSample(labels, one.sum, "_sum"), MetricSample(labels, below, "_count")]
    return Family(name, MetricKind.HISTOGRAM, text, tuple(samples))


def render(families: Iterable[Family]) -> str:
    return "".join(line for family in families for line in _lines(family))


def _lines(family: Family) -> Iterator[str]:
    if not family.samples:
        return
    yield f"# HELP {family.name} {_escaped(family.help)}\n# TYPE {family.name} {family.kind.value}\n"
    for sample in family.samples:
        labels = ",".join(f'{name}="{_escaped(value[:LONGEST], quoted=True)}"' for name, value in sample.labels)
        told = f"{{{labels}}}" if labels else ""
        yield f"{family.name}{sample.suffix}{told} {_number(sample.value)}\n"


def _escaped(text: str, *, quoted: bool = False) -> str:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return escaped.replace('"', '\\"') if quoted else escaped


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))
