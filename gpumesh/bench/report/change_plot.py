"""Draws changes with their intervals as SVG: a row for each figure, around a line at no change. No scripts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from gpumesh.bench.report.svg import (
    AXIS_HEIGHT,
    LABEL_HEIGHT,
    MARK_HEIGHT,
    ROW_HEIGHT,
    ROWS_LEFT,
    ROWS_RIGHT,
    draw_text,
    format_number,
    join_figure,
    row_label,
    tick_label,
    ticks,
)

MIN_SHOWN, MAX_SHOWN = 2.0, 100.0  # in percent: how far the axis reaches to each side, at least and at most
# The CSS classes of the verdicts: the colours of the page's series.
_COLOURS = {"better": "s2", "worse": "s5", "no clear difference": "s0", "too few to tell": "s0"}


@dataclass(frozen=True, slots=True)
class ChangeRow:
    """The change of a figure in percent, with the ends of its interval. ``verdict`` decides the colour."""

    label: str
    low: float
    change: float
    high: float
    verdict: str


def draw_changes(title: str, rows: Sequence[ChangeRow]) -> str:
    """Draws a line from the low end of each interval to the high end, with a point at the change.

    Returns an empty text if there is no row.
    """
    if not rows:
        return ""
    limit = _axis_limit(rows)
    axis = ticks(-limit, limit)
    bottom = ROW_HEIGHT * len(rows)
    parts = []
    for index, tick in enumerate(axis):
        x = _position(tick, axis)
        style = "span" if abs(tick) < 1e-9 else "grid"  # the line at no change is stronger
        parts.append(f'<line class="{style}" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{bottom}"/>')
        anchor = "middle" if index else "start"
        parts.append(draw_text(x, bottom + 16, tick_label(round(tick, 6)), "axis", anchor))
    parts.append(draw_text(100, bottom + 16, "% change", "axis", "end"))
    for index, row in enumerate(rows):
        top = ROW_HEIGHT * index + LABEL_HEIGHT
        y = top + MARK_HEIGHT // 2
        colour = _COLOURS.get(row.verdict, "s0")
        low_x, x, high_x = (
            _position(min(max(value, axis[0]), axis[-1]), axis) for value in (row.low, row.change, row.high)
        )
        interval = f"{format_number(row.low)} to {format_number(row.high)} %"
        tooltip = escape(f"{row.label}: {format_number(row.change)} % ({interval}), {row.verdict}")
        parts.append(row_label(row.label, top))
        parts.append(
            f'<g><title>{tooltip}</title><line class="line {colour}" x1="{low_x:.2f}%" x2="{high_x:.2f}%" '
            f'y1="{y}" y2="{y}"/><circle class="{colour}" cx="{x:.2f}%" cy="{y}" r="5"/></g>'
        )
        parts.append(draw_text(ROWS_RIGHT, y + 4, f"{row.change:+.1f} %", "value", shift=8))
    return join_figure(title, parts, bottom + AXIS_HEIGHT)


def _axis_limit(rows: Sequence[ChangeRow]) -> float:
    """How far the axis reaches: twice as far as half of the intervals do. Longer ones are cut at its ends."""
    reaches = sorted(max(abs(row.low), abs(row.high)) for row in rows)
    return min(max(2.0 * reaches[len(reaches) // 2], MIN_SHOWN), MAX_SHOWN)


def _position(value: float, axis: Sequence[float]) -> float:
    """The x position of a value between the first tick and the last, in percent of the plot's width."""
    share = (value - axis[0]) / (axis[-1] - axis[0])
    return ROWS_LEFT + share * (ROWS_RIGHT - ROWS_LEFT)
