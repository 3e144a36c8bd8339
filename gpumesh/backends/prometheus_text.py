"""Gauges of a server's ``/metrics`` page, Prometheus's text format (0.0.4), read within bounds. Pure.

The page is a remote server's, so it is hostile until it was read here: of a page only the first ``PAGE_BYTES`` are
looked at, of a metric only the first ``MAX_SERIES`` series, and a sample is a finite number that is not negative, or
nothing.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

from gpumesh.backends import safe_json

PAGE_BYTES = 1 << 20  # vLLM's page has about 100 KiB for each model, by far the most of it histograms
MAX_SERIES = 64  # one for each engine of a server, or for each of its models
MAX_LABEL_BYTES = 2000
MAX_REQUESTS = 1_000_000
MAX_SAMPLE = 1e12


def read_samples(page: bytes, *names: str) -> tuple[float, ...]:
    """The samples of the first of these metrics that the page has, one for each of its series."""
    page = page[:PAGE_BYTES]
    for name in names:
        texts = (match[1] for _, match in zip(range(MAX_SERIES), _pattern(name).finditer(page), strict=False))
        samples = tuple(sample for text in texts if (sample := _sample(text)) is not None)
        if samples:
            return samples
    return ()


def read_request_count(page: bytes, *names: str) -> int | None:
    """The sum over all series of a gauge that counts requests; ``None`` where the page does not have it."""
    samples = read_samples(page, *names)
    return safe_json.as_bounded_count(int(sum(samples)), MAX_REQUESTS) if samples else None


def read_share_pct(page: bytes, *names: str) -> int | None:
    """The largest of all series of a gauge from 0 to 1, in percent; ``None`` for none, and for what is no share."""
    samples = read_samples(page, *names)
    return round(100 * max(samples)) if samples and max(samples) <= 1 else None


@lru_cache(maxsize=64)
def _pattern(name: str) -> re.Pattern[bytes]:
    """A line of this metric: labels are passed over, for a label's value may hold anything but a line end."""
    labels = rb"(?:\{[^\n]{0,%d}\})?" % MAX_LABEL_BYTES
    return re.compile(rb"^" + re.escape(name.encode()) + labels + rb"[ \t]{1,8}([^\s]{1,40})", re.MULTILINE)


def _sample(text: bytes) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and 0 <= value <= MAX_SAMPLE else None
