from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gpumesh.gateway.observe.exposition import counter, gauge, histogram, render
from gpumesh.gateway.observe.metrics import Histogram


def test_a_page_as_prometheus_reads_it() -> None:
    waits = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        waits.observe(value)
    text = render(
        [
            gauge("up", "Whether it is up.", [((("node", "a"),), 1.0), ((("node", "b"),), None)]),
            counter("seen_total", "Seen.", [((), 3.0)]),
            histogram("wait_seconds", "Waited.", (0.1, 1.0), {(("node", "a"),): waits}),
            gauge("empty", "Nothing is known.", []),
        ]
    )
    assert text.splitlines() == [
        "# HELP up Whether it is up.",
        "# TYPE up gauge",
        'up{node="a"} 1',
        "# HELP seen_total Seen.",
        "# TYPE seen_total counter",
        "seen_total 3",
        "# HELP wait_seconds Waited.",
        "# TYPE wait_seconds histogram",
        'wait_seconds_bucket{node="a",le="0.1"} 2',
        'wait_seconds_bucket{node="a",le="1"} 3',
        'wait_seconds_bucket{node="a",le="+Inf"} 4',
        'wait_seconds_sum{node="a"} 7.65',
        'wait_seconds_count{node="a"} 4',
    ]
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {name: family.type for name, family in families.items()} == {
        "up": "gauge",
        "seen": "counter",
        "wait_seconds": "histogram",
    }


@given(st.text(max_size=40), st.floats(allow_nan=False))
def test_any_label_and_any_number_comes_back(value: str, number: float) -> None:
    text = render([gauge("g", "A help\nof two \\lines.", [((("name", value),), number)])])
    (family,) = text_string_to_metric_families(text)
    (sample,) = family.samples
    # The parser splits lines as str.splitlines does, which Prometheus does not.
    if value.splitlines() in ([value], []):
        assert sample.labels == {"name": value}
    assert sample.value == pytest.approx(number)
