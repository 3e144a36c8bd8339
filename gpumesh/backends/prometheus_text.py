"""Reads gauges from a server's ``/metrics`` page in Prometheus's text format (0.0.4), within bounds. Pure.

The page comes from a remote server, so it may be hostile. Only the first ``PAGE_BYTES`` of a page are read, and only
the first ``MAX_SERIES`` series of a metric. A sample that is negative or not finite is left out.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from itertools import islice

from gpumesh.backends import safe_json

PAGE_BYTES = 1 << 20  # vLLM's page has about 100 KiB for each model, by far the most of it histograms
MAX_SERIES = 64  # of one metric; a server has one series for each engine, or one for each model
MAX_LABEL_BYTES = 2000  # a sample whose labels together are longer is not read
MAX_REQUESTS = 1_000_000  # a larger number of requests is not believed
MAX_SAMPLE = 1e12  # a larger sample is left out


def read_samples(page: bytes, *names: str) -> tuple[float, ...]:
    """The samples of one metric, one for each series; empty if the page does not have the metric. ``names`` are the
    possible names of the metric; the first name that has samples is used."""
    page = page[:PAGE_BYTES]
    for name in names:
        lines = islice(_line_pattern(name).finditer(page), MAX_SERIES)
        samples = [_parse_sample(line["sample"]) for line in lines]
        usable_samples = tuple(sample for sample in samples if sample is not None)
        if usable_samples:
            return usable_samples
    return ()


def read_request_count(page: bytes, *names: str) -> int | None:
    """The sum over all series of a gauge that counts requests; ``None`` if the page does not have it. ``names`` as for
    ``read_samples``."""
    samples = read_samples(page, *names)
    return safe_json.as_bounded_count(int(sum(samples)), MAX_REQUESTS) if samples else None


def read_share_pct(page: bytes, *names: str) -> int | None:
    """A gauge that goes from 0 to 1, as percent: the largest of its series. ``None`` if the page does not have it, or
    if a sample is above 1, so that the gauge means something else. ``names`` as for ``read_samples``."""
    samples = read_samples(page, *names)
    if not samples or max(samples) > 1:
        return None
    return round(100 * max(samples))


@lru_cache(maxsize=64)
def _line_pattern(name: str) -> re.Pattern[bytes]:
    """A pattern that matches a line of this metric, and captures its ``sample``. The labels are skipped and not parsed:
    a label's value may hold any character but a line end."""
    labels = rb"(?:\{[^\n]{0,%d}\})?" % MAX_LABEL_BYTES
    return re.compile(rb"^" + re.escape(name.encode()) + labels + rb"[ \t]{1,8}(?P<sample>[^\s]{1,40})", re.MULTILINE)


def _parse_sample(text: bytes) -> float | None:
    """The number; ``None`` for a text that is no number, and for a number outside of the bounds."""
    try:
        value = float(text)
    except ValueError:  # no number
        return None
    return value if math.isfinite(value) and 0 <= value <= MAX_SAMPLE else None
