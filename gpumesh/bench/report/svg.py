"""Draws the small plots of the benchmark's HTML report as SVG text: bars, ranges, lines, scatter. No scripts. Pure.

A plot is as wide as the page lets it be: horizontal positions are percentages, heights and texts are in pixels, so that
text has the same size on a telephone and on a wide screen. Colours are CSS classes (``s0`` to ``s5``, ``axis``,
``grid``), so that the page's light and dark themes apply. All text is escaped here. Numbers that are not finite are
left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeGuard

# Positions from left to right, in percent of the plot's width.
ROWS_LEFT, ROWS_RIGHT = 0.5, 76.0  # of bars and ranges; the value of a row is written behind its end
POINTS_LEFT, POINTS_RIGHT = 15.0, 95.0  # the numbers of the y axis are on the left of the points
# Heights in pixels.
ROW_HEIGHT = 42  # of a bar or a range, with its label above it
LABEL_HEIGHT = 16
MARK_HEIGHT = 16
AXIS_HEIGHT = 22  # the numbers of the x axis
POINTS_HEIGHT, POINTS_TOP = 280, 26  # of a plot of points, and of its unit at the top
SERIES_COLOURS = 6  # the CSS classes s0 to s5
MAX_LABEL = 46  # characters; more would not fit on a telephone


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
    """Draws a horizontal bar for each row, with its label above it. Returns an empty text if no value is known."""
    known_values = [row.value for row in rows if _is_finite(row.value)]
    if not known_values:
        return ""
    axis = ticks(0.0, max(known_values))
    height = ROW_HEIGHT * len(rows) + AXIS_HEIGHT
    parts = _vertical_grid(axis, height, unit)
    for index, row in enumerate(rows):
        top = ROW_HEIGHT * index + LABEL_HEIGHT
        parts.append(row_label(row.label, top))
        if not _is_finite(row.value):
            parts.append(draw_text(ROWS_LEFT, top + 15, "unknown", "axis"))
            continue
        end = _scale(row.value, axis, ROWS_LEFT, ROWS_RIGHT)
        width = max(end - ROWS_LEFT, 0.2)  # a value of 0 has a bar that can be seen
        tooltip = f"{escape(row.label)}: {format_number(row.value)} {escape(unit)}"
        parts.append(
            f'<rect class="s0" x="{ROWS_LEFT}%" y="{top + 3}" width="{width:.2f}%" height="{MARK_HEIGHT}" rx="2">'
            f"<title>{tooltip}</title></rect>"
        )
        parts.append(draw_text(end, top + 15, format_number(row.value), "value", shift=5))
    return join_figure(title, parts, height)


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
    height = ROW_HEIGHT * len(rows) + AXIS_HEIGHT
    parts = _vertical_grid(axis, height, unit)
    for index, (row, marks) in enumerate(zip(rows, known_marks, strict=True)):
        top = ROW_HEIGHT * index + LABEL_HEIGHT
        y = top + 11  # the middle of the marks
        parts.append(row_label(row.label, top))
        if not marks:
            parts.append(draw_text(ROWS_LEFT, top + 15, "unknown", "axis"))
            continue
        positions = [_scale(value, axis, ROWS_LEFT, ROWS_RIGHT) for _name, value in marks]
        first, last = positions[0], positions[-1]
        parts.append(f'<line class="span" x1="{first:.2f}%" x2="{last:.2f}%" y1="{y}" y2="{y}"/>')
        for number, (x, (name, value)) in enumerate(zip(positions, marks, strict=True)):
            colour = names.index(name) % SERIES_COLOURS
            radius = 5 if number == 0 else 4  # the first mark is larger
            tooltip = f"{escape(row.label)}: {escape(name)} {format_number(value)} {escape(unit)}"
            parts.append(
                f'<circle class="s{colour}" cx="{x:.2f}%" cy="{y}" r="{radius}"><title>{tooltip}</title></circle>'
            )
        last_name, last_value = marks[-1]
        parts.append(draw_text(max(positions), y + 4, f"{last_name} {format_number(last_value)}", "value", shift=9))
    return join_figure(title, parts, height, legend=names)


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

    ``mark`` is a value on the x axis that gets a vertical line, with its name. Returns an empty text if there is no
    point.
    """
    finite_series = [
        PlotSeries(one_series.label, tuple((x, y) for x, y in one_series.points if _is_finite(x) and _is_finite(y)))
        for one_series in series
    ]
    all_points = [point for one_series in finite_series for point in one_series.points]
    if not all_points:
        return ""
    x_axis, y_axis = ticks(0.0, max(x for x, _ in all_points)), ticks(0.0, max(y for _, y in all_points))
    bottom = POINTS_HEIGHT - AXIS_HEIGHT
    parts = _axes_of_points(x_axis, y_axis, x_unit, y_unit)
    if mark is not None:
        parts += _marked_line(_scale(mark[0], x_axis, POINTS_LEFT, POINTS_RIGHT), mark[1], bottom)
    for index, one_series in enumerate(finite_series):
        positions = [
            (_scale(x, x_axis, POINTS_LEFT, POINTS_RIGHT), _scale(y, y_axis, bottom, POINTS_TOP))
            for x, y in one_series.points
        ]
        style = f"s{index % SERIES_COLOURS}"
        if lines:
            parts += _joining_lines(positions, style)
        radius = 4 if lines else 2.5  # points without lines are many, and so smaller
        for (x, y), (x_value, y_value) in zip(positions, one_series.points, strict=True):
            tooltip = f"{one_series.label}: {format_number(y_value)} {y_unit} at {format_number(x_value)} {x_unit}"
            circle = f'<circle class="{style}" cx="{x:.2f}%" cy="{y:.1f}" r="{radius}">'
            parts.append(f"{circle}<title>{escape(tooltip)}</title></circle>")
    names = [one_series.label for one_series in finite_series]
    return join_figure(title, parts, POINTS_HEIGHT, legend=names if len(names) > 1 else ())


def _axes_of_points(x_axis: Sequence[float], y_axis: Sequence[float], x_unit: str, y_unit: str) -> list[str]:
    """Draws a horizontal line and a number for each tick of the y axis, the numbers of the x axis, and the units."""
    parts = []
    bottom = POINTS_HEIGHT - AXIS_HEIGHT
    for tick in y_axis:
        y = _scale(tick, y_axis, bottom, POINTS_TOP)  # in SVG, y grows downwards: so the axis begins at the bottom
        parts.append(f'<line class="grid" x1="{POINTS_LEFT}%" x2="{POINTS_RIGHT}%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(draw_text(POINTS_LEFT, y + 4, tick_label(tick), "axis", "end", shift=-8))
    *ticks_before, last_tick = x_axis
    for tick in ticks_before:
        x = _scale(tick, x_axis, POINTS_LEFT, POINTS_RIGHT)
        parts.append(draw_text(x, bottom + 16, tick_label(tick), "axis", "middle"))
    # The last number stands at the right end together with the unit, which has no other place on a narrow screen.
    parts.append(draw_text(100, bottom + 16, f"{tick_label(last_tick)} {x_unit}", "axis", "end"))
    parts.append(draw_text(0, 12, y_unit, "axis"))
    return parts


def _marked_line(x: float, name: str, bottom: float) -> list[str]:
    """Draws a vertical line at a value of the x axis, with its name at the top."""
    anchor, shift = ("start", 5) if x < (POINTS_LEFT + POINTS_RIGHT) / 2 else ("end", -5)
    return [
        f'<line class="marked" x1="{x:.2f}%" x2="{x:.2f}%" y1="{POINTS_TOP - 8}" y2="{bottom}"/>',
        draw_text(x, POINTS_TOP - 8, name, "label", anchor, shift=shift),
    ]


def _joining_lines(positions: Iterable[tuple[float, float]], style: str) -> list[str]:
    """Draws a line from each point to the next. A polyline could not have percentages."""
    return [
        f'<line class="line {style}" x1="{x1:.2f}%" y1="{y1:.1f}" x2="{x2:.2f}%" y2="{y2:.1f}"/>'
        for (x1, y1), (x2, y2) in itertools.pairwise(positions)
    ]


def _vertical_grid(axis: Sequence[float], height: int, unit: str) -> list[str]:
    """Draws a vertical line and a number for each tick of the x axis of bars or ranges, and the unit."""
    parts = []
    bottom = height - AXIS_HEIGHT
    for index, tick in enumerate(axis):
        x = _scale(tick, axis, ROWS_LEFT, ROWS_RIGHT)
        parts.append(f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{bottom}"/>')
        parts.append(draw_text(x, bottom + 16, tick_label(tick), "axis", "middle" if index else "start"))
    parts.append(draw_text(100, bottom + 16, unit, "axis", "end"))
    return parts


def _scale(value: float, axis: Sequence[float], low: float, high: float) -> float:
    """The position of ``value`` if the first tick of the axis is at position ``low`` and the last at ``high``.

    On an axis with only one tick, it is ``low``.
    """
    first_tick, last_tick = axis[0], axis[-1]
    if first_tick == last_tick:
        return low
    return low + (value - first_tick) / (last_tick - first_tick) * (high - low)


def row_label(label: str, bottom: float) -> str:
    """Draws the label of a row, shortened if it is long; it ends above ``bottom`` (pixels)."""
    return draw_text(ROWS_LEFT, bottom - 3, _truncate(label, MAX_LABEL), "label")


def _truncate(label: str, limit: int) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"


def draw_text(x: float, y: float, text: str, style: str, anchor: str = "start", *, shift: int = 0) -> str:
    """Draws a text, escaped. ``x`` is in percent, and ``shift`` moves the text by so many pixels from there. ``style``
    is a CSS class; ``anchor`` tells which point of the text is at ``x``."""
    moved = f' dx="{shift}"' if shift else ""
    return f'<text class="{style}" x="{x:.2f}%" y="{y:.1f}"{moved} text-anchor="{anchor}">{escape(text)}</text>'


def join_figure(title: str, parts: Sequence[str], height: int, *, legend: Sequence[str] = ()) -> str:
    """Joins the parts of a plot into a figure with its title, and a legend of names. Colours repeat after
    ``SERIES_COLOURS`` names."""
    body = "\n".join(parts)
    keys = "".join(
        f'<span class="key"><svg class="swatch" width="10" height="10" aria-hidden="true">'
        f'<circle class="s{index % SERIES_COLOURS}" cx="5" cy="5" r="5"/></svg> {escape(name)}</span> '
        for index, name in enumerate(legend)
    )
    legend_html = f'<p class="legend">{keys}</p>' if keys else ""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption>{legend_html}<svg class="plot" width="100%" '
        f'height="{height}" role="img" aria-label="{escape(title)}">\n{body}\n</svg></figure>\n'
    )
