"""Draws the small plots of the benchmark's HTML report as SVG text: bars, ranges, lines, scatter. No scripts. Pure.

Colours are CSS classes (``s0`` to ``s5``, ``axis``, ``grid``), so that the page's light and dark themes apply. All text
is escaped here. Numbers that are not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeGuard

# Sizes in the units of the view box; the page scales the whole plot.
WIDTH = 720
LEFT, RIGHT, TOP, BOTTOM = 150, 70, 12, 34  # the margins, which hold the labels
ROW_HEIGHT = 28  # of a bar or a range
POINTS_HEIGHT = 260  # of a plot of points, without its legend
LEGEND_HEIGHT, LEGEND_STEP = 20, 130  # the step is the width of one name
SERIES_COLOURS = 6  # the CSS classes s0 to s5


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of a bar chart. ``value`` is ``None`` if it is unknown."""

    label: str
    value: float | None


@dataclass(frozen=True, slots=True)
class Range:
    """A row of marks (name and value) on one axis, joined by a line. The first mark is drawn larger."""

    label: str
    marks: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True, slots=True)
class PlotSeries:
    """Points (x, y) of one colour."""

    label: str
    points: tuple[tuple[float, float], ...]


def format_number(value: float | None) -> str:
    """Writes a number with the decimals that three significant digits need, at most three: 12,345, 1.23, 0.012.

    An unknown value is a dash.
    """
    if not _is_finite(value):
        return "–"  # noqa: RUF001  # the dash of the tables
    if value == 0:
        return "0"
    power_of_ten = math.floor(math.log10(abs(value)))
    decimals = min(max(2 - power_of_ten, 0), 3)
    return f"{value:,.{decimals}f}"


def format_count(value: int | None) -> str:
    """Writes a whole number with all its digits: 12,345. An unknown number is a dash."""
    return format_number(None) if value is None else f"{value:,}"


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def tick_label(value: float) -> str:
    """Writes a round number as a person writes it, without trailing zeros: 1,000, 0.3."""
    return f"{value:,.10g}"  # ten digits: more would show a rounding error (0.30000000000000004)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Chooses about ``count`` ticks for an axis, from at most ``low`` to at least ``high``.

    The step between two ticks is 1, 2 or 5 times a power of ten, so all ticks are round numbers. If ``high`` is not
    above ``low``, or not finite, the axis gets the length 1.
    """
    has_length = math.isfinite(low) and math.isfinite(high) and high > low
    if not has_length:
        high = low + 1.0
    min_step = (high - low) / count
    power = 10.0 ** math.floor(math.log10(min_step))
    # A factor of 10 is 1 times the next power. 0.999999 and the 1e-9 below are for rounding errors: they must not make
    # the step or the axis larger.
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= min_step * 0.999999)
    first = math.floor(low / step)
    last = math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, last + 1)]


def draw_bars(title: str, rows: Sequence[Bar], unit: str) -> str:
    """Draws a horizontal bar for each row. Returns an empty text if no value is known."""
    known_values = [row.value for row in rows if _is_finite(row.value)]
    if not known_values:
        return ""
    axis = ticks(0.0, max(known_values))
    height = TOP + ROW_HEIGHT * len(rows) + BOTTOM
    parts = _vertical_grid(axis, height, unit)
    for index, row in enumerate(rows):
        y = TOP + ROW_HEIGHT * index
        text_y = y + 18  # the base line of the row's texts
        parts.append(_row_label(row.label, text_y))
        if not _is_finite(row.value):
            parts.append(_text(LEFT + 4, text_y, "unknown", "axis"))
            continue
        bar_end = _scale(row.value, axis, LEFT, WIDTH - RIGHT)
        bar_width = max(bar_end - LEFT, 0.5)  # a value of 0 has a bar that can be seen
        tooltip = f"{escape(row.label)}: {format_number(row.value)} {escape(unit)}"
        parts.append(
            f'<rect class="s0" x="{LEFT}" y="{y + 5}" width="{bar_width:.1f}" height="18" rx="2">'
            f"<title>{tooltip}</title></rect>"
        )
        parts.append(_text(bar_end + 5, text_y, format_number(row.value), "value"))
    return _figure(title, parts, height)


def draw_ranges(title: str, rows: Sequence[Range], unit: str) -> str:
    """Draws each row as a line from its first known mark to its last, with a point for each mark.

    A point shows its mark's name and value on hover. Returns an empty text if no value is known.
    """
    known_marks = [[(name, value) for name, value in row.marks if _is_finite(value)] for row in rows]
    all_marks = [mark for marks in known_marks for mark in marks]
    if not all_marks:
        return ""
    axis = ticks(0.0, max(value for _name, value in all_marks))
    names = list(dict.fromkeys(name for name, _value in all_marks))  # each name once; its position is its colour
    top = TOP + LEGEND_HEIGHT
    height = top + ROW_HEIGHT * len(rows) + BOTTOM
    parts = [*_legend(names), *_vertical_grid(axis, height, unit, top)]
    for index, (row, marks) in enumerate(zip(rows, known_marks, strict=True)):
        y = top + ROW_HEIGHT * index + ROW_HEIGHT // 2  # the middle of the row
        text_y = y + 4  # the base line of the row's texts
        parts.append(_row_label(row.label, text_y))
        if not marks:
            parts.append(_text(LEFT + 4, text_y, "unknown", "axis"))
            continue
        x_positions = [_scale(value, axis, LEFT, WIDTH - RIGHT) for _name, value in marks]
        first_x, last_x = x_positions[0], x_positions[-1]
        parts.append(f'<line class="span" x1="{first_x:.1f}" x2="{last_x:.1f}" y1="{y}" y2="{y}"/>')
        for number, (x, (name, value)) in enumerate(zip(x_positions, marks, strict=True)):
            colour = names.index(name) % SERIES_COLOURS
            radius = 5 if number == 0 else 4  # the first mark is larger
            tooltip = f"{escape(row.label)}: {escape(name)} {format_number(value)} {escape(unit)}"
            parts.append(
                f'<circle class="s{colour}" cx="{x:.1f}" cy="{y}" r="{radius}"><title>{tooltip}</title></circle>'
            )
        last_name, last_value = marks[-1]
        parts.append(_text(last_x + 8, text_y, f"{last_name} {format_number(last_value)}", "value"))
    return _figure(title, parts, height)


def draw_points(
    title: str,
    series: Sequence[PlotSeries],
    x_unit: str,
    y_unit: str,
    *,
    lines: bool,
    mark: tuple[float, str] | None = None,
) -> str:
    """Draws points over two axes that start at 0, joined by lines if ``lines``. Several series get a legend.

    ``mark`` is a place on the x axis with its name: a vertical line is drawn there.
    Returns an empty text if there is no point.
    """
    finite_series = [
        PlotSeries(one_series.label, tuple((x, y) for x, y in one_series.points if _is_finite(x) and _is_finite(y)))
        for one_series in series
    ]
    all_points = [point for one_series in finite_series for point in one_series.points]
    if not all_points:
        return ""
    x_axis, y_axis = ticks(0.0, max(x for x, _ in all_points)), ticks(0.0, max(y for _, y in all_points))
    legend_height = LEGEND_HEIGHT if len(finite_series) > 1 else 0
    height = POINTS_HEIGHT + legend_height
    top, bottom = TOP + legend_height, height - BOTTOM
    parts = []
    for tick in y_axis:
        y = _scale(tick, y_axis, bottom, top)  # in SVG, y grows downwards: so the axis begins at the bottom
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, tick_label(tick), "axis", "end"))
    for tick in x_axis:
        x = _scale(tick, x_axis, LEFT, WIDTH - RIGHT)
        parts.append(_text(x, bottom + 16, tick_label(tick), "axis", "middle"))
    parts.append(_text(WIDTH - 2, bottom + 16, x_unit, "axis", "end"))
    parts.append(_text(8, top + 4, y_unit, "axis"))
    if mark is not None:
        x = _scale(mark[0], x_axis, LEFT, WIDTH - RIGHT)
        parts.append(f'<line class="span" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke-dasharray="4 4"/>')
        parts.append(_text(x + 5, bottom - 6, mark[1], "value"))
    for index, one_series in enumerate(finite_series):
        positions = [
            (_scale(x, x_axis, LEFT, WIDTH - RIGHT), _scale(y, y_axis, bottom, top)) for x, y in one_series.points
        ]
        style = f"s{index % SERIES_COLOURS}"
        if lines and len(positions) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in positions)
            parts.append(f'<polyline class="line {style}" points="{path}"/>')
        radius = 4 if lines else 2.5  # points without lines are many, and so smaller
        for (x, y), (x_value, y_value) in zip(positions, one_series.points, strict=True):
            tooltip = f"{one_series.label}: {format_number(y_value)} {y_unit} at {format_number(x_value)} {x_unit}"
            circle = f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            parts.append(f"{circle}<title>{escape(tooltip)}</title></circle>")
    if legend_height:
        parts += _legend([one_series.label for one_series in finite_series])
    return _figure(title, parts, height)


def _legend(names: Sequence[str]) -> list[str]:
    """Draws the names with their colours, as many as fit on one line. Colours repeat after ``SERIES_COLOURS``."""
    parts = []
    max_names = (WIDTH - LEFT) // LEGEND_STEP
    for index, name in enumerate(names[:max_names]):
        x = LEFT + LEGEND_STEP * index
        parts.append(f'<circle class="s{index % SERIES_COLOURS}" cx="{x}" cy="{TOP}" r="4"/>')
        parts.append(_text(x + 9, TOP + 4, _truncate(name, 16), "axis"))
    return parts


def _vertical_grid(axis: Sequence[float], height: int, unit: str, top: int = TOP) -> list[str]:
    """Draws a vertical line and a number for each tick of the x axis, from ``top`` to the bottom margin."""
    parts = []
    for tick in axis:
        x = _scale(tick, axis, LEFT, WIDTH - RIGHT)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - BOTTOM}"/>')
        parts.append(_text(x, height - BOTTOM + 16, tick_label(tick), "axis", "middle"))
    parts.append(_text(WIDTH - 2, height - BOTTOM + 16, unit, "axis", "end"))
    return parts


def _scale(value: float, axis: Sequence[float], low: float, high: float) -> float:
    """The position of ``value`` if the first tick of the axis is at position ``low`` and the last at ``high``.

    On an axis with only one tick, it is ``low``.
    """
    first_tick, last_tick = axis[0], axis[-1]
    if first_tick == last_tick:
        return low
    return low + (value - first_tick) / (last_tick - first_tick) * (high - low)


def _row_label(label: str, y: float) -> str:
    return _text(LEFT - 8, y, _truncate(label, 22), "label", "end")


def _truncate(label: str, limit: int) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    """Draws a text, escaped. ``style`` is a CSS class; ``anchor`` tells which point of the text is at ``x``."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(title: str, parts: Sequence[str], height: int) -> str:
    """Joins the parts of a plot into a figure with its title."""
    body = "\n".join(parts)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">\n{body}\n</svg></figure>\n'
    )
