"""Draws changes with their intervals as SVG: a row for each figure, around a line at no change. No scripts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from gpumesh.bench.report.svg import format_number, tick_label, ticks

WIDTH, LEFT, RIGHT, TOP, BOTTOM, ROW_HEIGHT = 720, 170, 80, 12, 34, 26
MAX_SHOWN = 100.0  # in percent: a longer interval is cut there, so that the others can be seen
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
    axis = ticks(min(-1.0, *(_cut(row.low) for row in rows)), max(1.0, *(_cut(row.high) for row in rows)))
    height = TOP + ROW_HEIGHT * len(rows) + BOTTOM
    parts = []
    for tick in axis:
        x = _position(tick, axis)
        style = "span" if abs(tick) < 1e-9 else "grid"  # the line at no change is stronger
        parts.append(f'<line class="{style}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(_text(x, height - BOTTOM + 16, tick_label(round(tick, 6)), "axis", "middle"))
    parts.append(_text(WIDTH - 2, height - BOTTOM + 16, "% change", "axis", "end"))
    for index, row in enumerate(rows):
        y = TOP + ROW_HEIGHT * index + ROW_HEIGHT // 2
        colour = _COLOURS.get(row.verdict, "s0")
        low_x, x, high_x = (_position(_cut(value), axis) for value in (row.low, row.change, row.high))
        interval = f"{format_number(row.low)} to {format_number(row.high)} %"
        tooltip = escape(f"{row.label}: {format_number(row.change)} % ({interval}), {row.verdict}")
        parts.append(_text(LEFT - 8, y + 4, row.label, "label", "end"))
        parts.append(
            f'<g><title>{tooltip}</title><line class="line {colour}" x1="{low_x:.1f}" x2="{high_x:.1f}" '
            f'y1="{y}" y2="{y}"/><circle class="{colour}" cx="{x:.1f}" cy="{y}" r="5"/></g>'
        )
        parts.append(_text(WIDTH - RIGHT + 8, y + 4, f"{row.change:+.1f} %", "value"))
    body = "\n".join(parts)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">\n{body}\n</svg></figure>\n'
    )


def _cut(value: float) -> float:
    return min(max(value, -MAX_SHOWN), MAX_SHOWN)


def _position(value: float, axis: Sequence[float]) -> float:
    """The x position of a value between the first tick and the last."""
    share = (value - axis[0]) / (axis[-1] - axis[0])
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
