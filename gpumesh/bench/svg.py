"""Draws small plots as SVG text: bars, ranges, lines, scatter. For a page without scripts. Pure.

Colours are CSS classes (``s0`` to ``s5``, ``axis``, ``grid``), so that the page's light and dark themes apply. All text
is escaped here. Numbers that are not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeGuard

# Sizes in the units of the view box. The margins hold the labels; the page scales the whole.
WIDTH = 720
LEFT, RIGHT, TOP, BOTTOM = 150, 70, 12, 34
ROW_HEIGHT = 28
POINTS_HEIGHT = 260
LEGEND_HEIGHT, LEGEND_STEP = 20, 130
SERIES_COLOURS = 6


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    value: float | None


@dataclass(frozen=True, slots=True)
class Range:
    """A row of marks on one axis. The first mark is drawn larger; the line ends at the last."""

    label: str
    marks: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True, slots=True)
class PlotSeries:
    label: str
    points: tuple[tuple[float, float], ...]


def format_number(value: float | None) -> str:
    """Three significant digits, as in the tables; a dash for an unknown value."""
    if not _is_finite(value):
        return "–"  # noqa: RUF001  # the dash of the tables
    if value == 0:
        return "0"
    digits = max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{min(digits, 3)}f}"


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def tick_label(value: float) -> str:
    """A round number as a person writes it, without trailing zeros."""
    return f"{value:,.10g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from at most ``low`` to at least ``high``."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        high = low + 1.0
    min_step = (high - low) / count
    power = 10.0 ** math.floor(math.log10(min_step))
    # A rounding error must not lead to the next larger step.
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= min_step * 0.999999)
    first = math.floor(low / step)
    last = math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, last + 1)]


def draw_bars(title: str, rows: Sequence[Bar], unit: str) -> str:
    """Draws a horizontal bar for each row. Empty if no value is known."""
    known = [row.value for row in rows if _is_finite(row.value)]
    if not known:
        return ""
    axis = ticks(0.0, max(known))
    height = TOP + ROW_HEIGHT * len(rows) + BOTTOM
    parts = _vertical_grid(axis, height, unit)
    for index, row in enumerate(rows):
        y = TOP + ROW_HEIGHT * index
        parts.append(_row_label(row.label, y + 18))
        if not _is_finite(row.value):
            parts.append(_text(LEFT + 4, y + 18, "unknown", "axis"))
            continue
        x = _scale(row.value, axis, LEFT, WIDTH - RIGHT)
        parts.append(
            f'<rect class="s0" x="{LEFT}" y="{y + 5}" width="{max(x - LEFT, 0.5):.1f}" height="18" rx="2">'
            f"<title>{escape(row.label)}: {format_number(row.value)} {escape(unit)}</title></rect>"
        )
        parts.append(_text(x + 5, y + 18, format_number(row.value), "value"))
    return _figure(title, parts, height)


def draw_ranges(title: str, rows: Sequence[Range], unit: str) -> str:
    """Draws a line from the first known mark to the last, and each mark as a point that shows its name on hover."""
    known = [value for row in rows for _, value in row.marks if _is_finite(value)]
    if not known:
        return ""
    axis = ticks(0.0, max(known))
    names = list(dict.fromkeys(name for row in rows for name, value in row.marks if _is_finite(value)))
    top = TOP + LEGEND_HEIGHT
    height = top + ROW_HEIGHT * len(rows) + BOTTOM
    parts = [*_legend(names), *_vertical_grid(axis, height, unit, top)]
    for index, row in enumerate(rows):
        y = top + ROW_HEIGHT * index + 14
        parts.append(_row_label(row.label, y + 4))
        marks = [(name, value) for name, value in row.marks if _is_finite(value)]
        if not marks:
            parts.append(_text(LEFT + 4, y + 4, "unknown", "axis"))
            continue
        positions = [(name, value, _scale(value, axis, LEFT, WIDTH - RIGHT)) for name, value in marks]
        (_, _, first_x), (last_name, last_value, last_x) = positions[0], positions[-1]
        parts.append(f'<line class="span" x1="{first_x:.1f}" x2="{last_x:.1f}" y1="{y}" y2="{y}"/>')
        for order, (name, value, x) in enumerate(positions):
            parts.append(
                f'<circle class="s{names.index(name) % SERIES_COLOURS}" cx="{x:.1f}" cy="{y}"'
                f' r="{5 if order == 0 else 4}">'
                f"<title>{escape(row.label)}: {escape(name)} {format_number(value)} {escape(unit)}</title></circle>"
            )
        parts.append(_text(last_x + 8, y + 4, f"{last_name} {format_number(last_value)}", "value"))
    return _figure(title, parts, height)


def draw_points(title: str, series: Sequence[PlotSeries], x_unit: str, y_unit: str, *, lines: bool) -> str:
    """Draws points over two axes that start at 0, joined if ``lines``. Several series get a legend."""
    shown = [
        PlotSeries(plotted.label, tuple(point for point in plotted.points if all(map(math.isfinite, point))))
        for plotted in series
    ]
    points = [point for plotted in shown for point in plotted.points]
    if not points:
        return ""
    x_axis, y_axis = ticks(0.0, max(x for x, _ in points)), ticks(0.0, max(y for _, y in points))
    legend_height = LEGEND_HEIGHT if len(shown) > 1 else 0
    height = POINTS_HEIGHT + legend_height
    top, bottom = TOP + legend_height, height - BOTTOM
    parts = []
    for tick in y_axis:
        y = _scale(tick, y_axis, bottom, top)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, tick_label(tick), "axis", "end"))
    for tick in x_axis:
        x = _scale(tick, x_axis, LEFT, WIDTH - RIGHT)
        parts.append(_text(x, bottom + 16, tick_label(tick), "axis", "middle"))
    parts.append(_text(WIDTH - 2, bottom + 16, x_unit, "axis", "end"))
    parts.append(_text(8, top + 4, y_unit, "axis"))
    for index, plotted in enumerate(shown):
        positions = [
            (_scale(x, x_axis, LEFT, WIDTH - RIGHT), _scale(y, y_axis, bottom, top)) for x, y in plotted.points
        ]
        style = f"s{index % SERIES_COLOURS}"
        if lines and len(positions) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in positions)
            parts.append(f'<polyline class="line {style}" points="{path}"/>')
        for (x, y), (x_value, y_value) in zip(positions, plotted.points, strict=True):
            tooltip = escape(f"{plotted.label}: {format_number(y_value)} {y_unit} at {format_number(x_value)} {x_unit}")
            radius = 4 if lines else 2.5
            parts.append(
                f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{tooltip}</title></circle>'
            )
    if legend_height:
        parts += _legend([plotted.label for plotted in shown])
    return _figure(title, parts, height)


def _legend(names: Sequence[str]) -> list[str]:
    """The names with their colours, as many as fit on one line. Colours repeat after ``SERIES_COLOURS``."""
    parts = []
    for index, name in enumerate(names[: (WIDTH - LEFT) // LEGEND_STEP]):
        x = LEFT + LEGEND_STEP * index
        parts.append(f'<circle class="s{index % SERIES_COLOURS}" cx="{x}" cy="{TOP}" r="4"/>')
        parts.append(_text(x + 9, TOP + 4, _truncate(name, 16), "axis"))
    return parts


def _vertical_grid(axis: Sequence[float], height: int, unit: str, top: int = TOP) -> list[str]:
    parts = []
    for tick in axis:
        x = _scale(tick, axis, LEFT, WIDTH - RIGHT)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - BOTTOM}"/>')
        parts.append(_text(x, height - BOTTOM + 16, tick_label(tick), "axis", "middle"))
    parts.append(_text(WIDTH - 2, height - BOTTOM + 16, unit, "axis", "end"))
    return parts


def _scale(value: float, axis: Sequence[float], low: float, high: float) -> float:
    """The position of ``value`` if the first tick of the axis is at ``low`` and the last at ``high``."""
    span = axis[-1] - axis[0]
    return low + (value - axis[0]) / span * (high - low) if span else low


def _row_label(label: str, y: float) -> str:
    return _text(LEFT - 8, y, _truncate(label, 22), "label", "end")


def _truncate(label: str, limit: int) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(title: str, parts: Sequence[str], height: int) -> str:
    body = "\n".join(parts)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">\n{body}\n</svg></figure>\n'
    )
