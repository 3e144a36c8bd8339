"""Draws what the balancer has learned, forecast and caused, which `status -v` adds."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from gpumesh.cli.views.figures import UNKNOWN, format_duration
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.cli.views.tables import new_table
from gpumesh.state import DecisionState, LoadingState, MeshState

MAX_SHOWN_MODELS = 8  # of one node


def scheduling_views(state: MeshState) -> Iterator[RenderableType]:
    """Yields the table of learned figures, then a line for each node's last forecast, and one for its loads. Yields
    nothing for nodes that have answered nothing."""
    rows = [(node.name, learned) for node in state.nodes for learned in node.learned[:MAX_SHOWN_MODELS]]
    if rows:
        table = new_table()
        for title, is_number in (
            ("NODE", False),
            ("MODEL", False),
            ("TOK/S ALONE", True),
            ("NEIGHBOUR", True),
            ("READS TOK/S", True),
            ("LOADS IN", True),
            ("SLOTS", True),
        ):
            table.add_column(title, no_wrap=True, overflow="ellipsis", justify="right" if is_number else "left")
        for node_name, learned in rows:
            share = learned.neighbour_share
            cells = (
                clean_line(node_name, 24),
                clean_line(learned.model, 60),
                _number(learned.tokens_per_s),
                UNKNOWN if share is None else f"+{100.0 * share:.0f} %",
                _number(learned.prefill_tokens_per_s),
                UNKNOWN if learned.load_s is None else f"{learned.load_s:.1f} s",
                UNKNOWN if learned.slots is None else str(learned.slots),
            )
            table.add_row(*(Text(cell) for cell in cells))
        yield table
    for node in state.nodes:
        name = clean_line(node.name, 24)
        if node.decisions:
            yield Text(f"{name}: {describe_decision(node.decisions[0])}", style="dim")
        if node.loading is not None:
            yield Text(f"{name}: {describe_loading(node.loading)}", style="dim")


def _number(value: float | None) -> str:
    """A rate without decimals, as the text of a cell."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def describe_decision(decision: DecisionState) -> str:
    """The last answered request: its forecast, and what happened."""
    model = "" if decision.model is None else f"{clean_line(decision.model, 60)} "
    # ``why`` is the whole cost. ``forecast_s`` is the request's own time: the cost without what others lose by it.
    times = f"took {decision.actual_s:.2f} s, forecast {decision.forecast_s:.2f} s"
    return f"last {model}{format_duration(decision.age_s)} ago: {times}; cost: {clean_line(decision.why, 400)}"


def describe_loading(loading: LoadingState) -> str:
    """The loads of the last minutes."""
    models = ", ".join(f"{clean_line(model.name, 60)} {_times(model.loads)}" for model in loading.models)
    noun = "load" if loading.loads == 1 else "loads"
    duration = format_duration(loading.window_s)
    return f"{loading.loads} {noun} in the last {duration}, {loading.load_s:.1f} s in all: {models}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
