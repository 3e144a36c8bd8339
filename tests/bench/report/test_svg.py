"""Plots are XML that a browser draws, with nothing outside, nothing on top of another, and no number that is none."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.bench.report.svg import (
    MAX_LABEL,
    ROWS_LEFT,
    ROWS_RIGHT,
    Bar,
    PlotSeries,
    Range,
    draw_bars,
    draw_points,
    draw_ranges,
    format_number,
    tick_label,
    ticks,
)

NAMESPACE = "{http://www.w3.org/2000/svg}"


def drawn(text: str) -> ElementTree.Element:
    """As a browser reads it: in HTML the namespace goes without saying."""
    figure = ElementTree.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" '))
    (svg,) = [one for one in figure.iter(f"{NAMESPACE}svg") if one.attrib["class"] == "plot"]
    assert svg.attrib["width"] == "100%"
    height = float(svg.attrib["height"])
    for element in svg.iter():
        for name in ("x", "cx", "x1", "x2"):
            if name in element.attrib:
                assert 0 <= percent(element.attrib[name]) <= 100, "it grows with the page"
        for name in ("y", "cy", "y1", "y2"):
            assert 0 <= float(element.attrib.get(name, 0)) <= height
    return svg


def percent(position: str) -> float:
    assert position.endswith("%")
    return float(position[:-1])


def legend(text: str) -> list[str]:
    """The names in the legend of a figure."""
    return re.findall(r"</svg> ([^<]*)</span>", text)


def texts(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{NAMESPACE}text")]


def circles(svg: ElementTree.Element) -> list[ElementTree.Element]:
    """Those that stand for a value: they have a title."""
    return [one for one in svg.iter(f"{NAMESPACE}circle") if len(one)]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),  # noqa: RUF001
        (math.nan, "–"),  # noqa: RUF001
        (math.inf, "–"),  # noqa: RUF001
        (0.0, "0"),
        (0.0123, "0.012"),
        (0.5, "0.500"),
        (7.0, "7.00"),
        (-1.25, "-1.25"),
        (42.31, "42.3"),
        (733.2, "733"),
        (12345.6, "12,346"),
    ],
)
def test_three_digits(value: float | None, said: str) -> None:
    assert format_number(value) == said


def test_ticks_are_round_and_hold_the_values() -> None:
    assert ticks(0.0, 210.0) == [0.0, 50.0, 100.0, 150.0, 200.0, 250.0]
    assert ticks(0.0, 8.0) == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert [tick_label(tick) for tick in ticks(0.0, 0.7)] == ["0", "0.2", "0.4", "0.6", "0.8"]
    assert tick_label(2500.0) == "2,500"
    assert ticks(0.0, 0.0) == ticks(0.0, math.inf) == ticks(0.0, 1.0), "an axis in any case"


@given(st.floats(1e-6, 1e9))
def test_ticks_are_few(high: float) -> None:
    made = ticks(0.0, high)
    assert 2 <= len(made) <= 8
    assert made[0] == 0.0
    assert made[-1] >= high * 0.999999
    steps = {round((later - sooner) / made[1], 6) for sooner, later in itertools.pairwise(made)}
    assert steps == {1.0}


def test_bars() -> None:
    svg = drawn(draw_bars("Tokens", [Bar("alpha", 100.0), Bar("beta", 50.0), Bar("gamma", None)], "tok/s"))
    first, second = svg.iter(f"{NAMESPACE}rect")
    assert percent(first.attrib["width"]) == pytest.approx(ROWS_RIGHT - ROWS_LEFT)
    assert percent(second.attrib["width"]) == pytest.approx(percent(first.attrib["width"]) / 2)
    said = texts(svg)
    assert {"alpha", "beta", "gamma", "100", "50.0", "unknown", "tok/s"} <= set(said)
    assert draw_bars("Tokens", [Bar("alpha", None), Bar("beta", math.nan)], "tok/s") == "", "nothing to draw"
    assert draw_bars("Tokens", [], "tok/s") == ""


def test_ranges() -> None:
    rows = [
        Range("alpha", (("p50", 10.0), ("p90", 40.0), ("p99", None))),
        Range("beta", (("p50", 20.0), ("p90", None), ("p99", None))),
        Range("gamma", (("p50", None), ("p90", None), ("p99", None))),
    ]
    figure = draw_ranges("Latency", rows, "ms")
    svg = drawn(figure)
    marks = circles(svg)
    assert [one[0].text for one in marks] == ["alpha: p50 10.0 ms", "alpha: p90 40.0 ms", "beta: p50 20.0 ms"]
    assert [one.attrib["class"] for one in marks] == ["s0", "s1", "s0"]
    assert legend(figure) == ["p50", "p90"], "the legend names what is there, and no more"
    said = texts(svg)
    assert {"p90 40.0", "p50 20.0", "unknown", "ms"} <= set(said)
    assert draw_ranges("Latency", rows[2:], "ms") == ""


def joining_lines(svg: ElementTree.Element) -> list[ElementTree.Element]:
    return [one for one in svg.iter(f"{NAMESPACE}line") if one.attrib["class"].startswith("line ")]


def test_lines_and_points() -> None:
    series = [PlotSeries("p50", ((1.0, 10.0), (2.0, 20.0))), PlotSeries("p90", ((1.0, 30.0), (2.0, math.inf)))]
    figure = draw_points("Over concurrency", series, "in flight", "ms", lines=True, mark=(2.0, "knee"))
    svg = drawn(figure)
    (line,) = joining_lines(svg)
    assert line.attrib["class"] == "line s0", "one point makes no line"
    assert [one[0].text for one in circles(svg)] == [
        "p50: 10.0 ms at 1.00 in flight",
        "p50: 20.0 ms at 2.00 in flight",
        "p90: 30.0 ms at 1.00 in flight",
    ]
    assert legend(figure) == ["p50", "p90"]
    (mark,) = [one for one in svg.iter(f"{NAMESPACE}line") if one.attrib["class"] == "marked"]
    assert mark.attrib["x1"] == mark.attrib["x2"] == circles(svg)[1].attrib["cx"]
    assert "knee" in texts(svg)
    alone = draw_points("Alone", series[:1], "s", "ms", lines=False)
    assert joining_lines(drawn(alone)) == []
    assert legend(alone) == [], "one series needs no legend"
    assert draw_points("Nothing", [PlotSeries("p50", ())], "s", "ms", lines=True) == ""


def test_many_series_have_no_legend_outside_the_picture() -> None:
    series = [PlotSeries(f"node{number}", ((1.0, float(number)),)) for number in range(12)]
    svg = drawn(draw_points("Many", series, "s", "ms", lines=False))
    assert len(circles(svg)) == 12


HOSTILE = "</svg><script>alert(1)</script>\"'&<img onerror=x>"


@given(st.text(max_size=40))
def test_whatever_a_host_calls_itself(name: str) -> None:
    safe = re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", name)  # what `printable` leaves
    drawn(draw_bars(safe, [Bar(safe, 1.0)], safe))
    drawn(draw_ranges(safe, [Range(safe, ((safe, 1.0),))], safe))
    drawn(draw_points(safe, [PlotSeries(safe, ((1.0, 1.0),)), PlotSeries(safe, ((2.0, 1.0),))], safe, safe, lines=True))


def test_markup_stays_text() -> None:
    svg = drawn(draw_bars(HOSTILE, [Bar(HOSTILE, 1.0)], HOSTILE))
    assert {element.tag.removeprefix(NAMESPACE) for element in svg.iter()} == {"svg", "line", "text", "rect", "title"}
    assert svg.attrib["aria-label"] == HOSTILE
    (label,) = [text for text in texts(svg) if text.endswith("…")]
    assert len(label) == MAX_LABEL
    assert HOSTILE.startswith(label[:-1]), "what is long is shortened"
