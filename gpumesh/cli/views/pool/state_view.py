"""Draws the states of pools: a table of all, and all that is known of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.text import Text

from gpumesh.cli.views.console import console, print_plain
from gpumesh.cli.views.figures import UNKNOWN, format_bytes, format_duration
from gpumesh.cli.views.findings import add_hint, make_notes_table
from gpumesh.cli.views.pool.plan_view import describe_path, draw_facts, format_round_trip, speed_facts
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.cli.views.tables import Cell, Column, ColumnCells, fit_table, print_fitted_table
from gpumesh.pools.base import MemberState, PoolPhase, PoolState
from gpumesh.text.quoting import paste_command

# The mark before a phase and its style for rich.
PHASE_MARKS = {
    PoolPhase.STOPPED: ("○", "dim"),
    PoolPhase.PLANNING: ("◐", "cyan"),
    PoolPhase.STARTING: ("◐", "cyan"),
    PoolPhase.LOADING: ("◐", "cyan"),
    PoolPhase.READY: ("●", "green"),
    PoolPhase.BACKOFF: ("↻", "yellow"),
    PoolPhase.FAILED: ("✗", "red"),
    PoolPhase.STOPPING: ("‖", "cyan"),
}


def print_pools(states: Sequence[PoolState], now: datetime, *, wide: bool = False) -> None:
    """Prints a row for each pool to stdout; with ``wide`` all columns."""
    rows = [
        (
            clean_line(state.pool, 63),
            _phase_cell(state),
            clean_line(state.model, 200),
            ", ".join(member.node for member in state.members),
            "" if state.since is None else format_age(state.since, now),
            UNKNOWN if state.tokens_per_s is None else f"{state.tokens_per_s:.1f}",
            UNKNOWN if state.predicted is None else f"{state.predicted.tokens_per_s:.1f}",
            format_acceptance(state),
            str(state.starts) if state.starts else UNKNOWN,
            describe_reason(state),
        )
        for state in states
    ]
    columns = (
        Column("POOL", min_width=8),
        Column("PHASE"),
        Column("MODEL", 1, min_width=12),
        Column("NODES", 4, min_width=12),
        Column("FOR", 4),
        Column("TOK/S", 4, right=True),
        Column("PLANNED", 5, right=True),
        Column("ACCEPTED", 6, right=True),
        Column("STARTS", 7, right=True),
        Column("REASON", 3, min_width=20),
    )
    print_fitted_table(columns, rows, wide=wide)


def _phase_cell(state: PoolState) -> Cell:
    """The phase, and how much of the model has been loaded: ``loading 45 %``."""
    mark, style = PHASE_MARKS[state.phase]
    return Cell(f"{mark} {state.phase} {format_share(state)}".rstrip(), style)


def print_pool(state: PoolState, now: datetime) -> None:
    """Prints all that is known of one pool to stdout."""
    out = console()
    print_plain(out, Group(*_draw_pool(state, now, out.width)))


def _draw_pool(state: PoolState, now: datetime, width: int) -> Iterator[RenderableType]:
    mark, style = PHASE_MARKS[state.phase]
    head = Text.assemble(
        (mark, style), " ", (clean_line(state.pool, 63), "bold"), f"  {clean_line(state.model, 200)}  "
    )
    head.append(state.phase, style=style)
    if state.since is not None:
        head.append(f" for {format_age(state.since, now)}")
    yield head
    if state.reason:
        reason = Text(clean_line(describe_reason(state)))
        add_hint(reason, state.hint)
        yield make_notes_table([(Text(mark, style=style), reason)])
    elif state.phase is PoolPhase.STOPPED:
        yield Text(
            f"  → {paste_command('gpumesh pool up {POOL}', POOL=clean_line(state.pool, 63))} starts it", style="dim"
        )
    if state.members:
        yield Text()
        yield _member_table(state, width)
    facts = list(_list_facts(state))
    if facts:
        yield Text()
        yield draw_facts(facts)


def _member_table(state: PoolState, width: int) -> RenderableType:
    def column(column: Column, texts: Sequence[Text | str]) -> ColumnCells:
        return column, [text if isinstance(text, Text) else Text(clean_line(text)) for text in texts]

    members = state.members
    return fit_table(
        [
            column(Column("NODE", min_width=8), [member.node for member in members]),
            column(Column("LAYERS", right=True), [str(member.layers) for member in members]),
            column(Column("PLANNED", 1, right=True), [format_bytes(member.planned_bytes) for member in members]),
            column(Column("MEASURED", right=True), [_measured_cell(member) for member in members]),
            column(Column("TO HEAD", 2, right=True), [_way_to_head(member) for member in members]),
            column(Column("PATH", 4), [describe_path(member.path) for member in members]),
            column(Column("PROBLEM", 3, min_width=20), [Text(member.problem or "", style="red") for member in members]),
        ],
        width,
    )


def _measured_cell(member: MemberState) -> str:
    """The bytes that llama-server reports for the member, and how far that is from the plan."""
    if member.measured_bytes is None:
        return UNKNOWN
    measured = format_bytes(member.measured_bytes)
    if not member.planned_bytes:
        return measured
    return f"{measured} ({100 * (member.measured_bytes / member.planned_bytes - 1):+.1f} %)"


def _way_to_head(member: MemberState) -> Text:
    return Text("is head", style="bold") if member.is_head else Text(format_round_trip(member.path))


def _list_facts(state: PoolState) -> Iterator[tuple[str, str]]:
    loaded = format_progress(state)
    if loaded:
        yield "load", loaded
    if state.tokens_per_s is not None:
        yield "measured", f"{state.tokens_per_s:.1f} tokens/s for one stream"
    if state.draft_acceptance is not None:
        yield "draft", f"{format_acceptance(state)} of the proposed tokens were accepted"
    if state.predicted is not None:
        yield from speed_facts(state.predicted, label="planned")
    if state.starts > 1:
        yield "starts", f"{state.starts} since `gpumesh pool up`"


# -- texts -----------------------------------------------------------------------------------------------------------


def format_age(since: datetime, now: datetime) -> str:
    return format_duration((now - since).total_seconds())


def format_acceptance(state: PoolState) -> str:
    return UNKNOWN if state.draft_acceptance is None else f"{100 * state.draft_acceptance:.0f} %"


def describe_reason(state: PoolState) -> str:
    """Why the pool is in its phase, and when it is started again."""
    reason = state.reason or ""
    if state.phase is PoolPhase.BACKOFF and state.retry_in_s is not None:
        return f"{reason}{'; ' if reason else ''}starts again in {format_duration(state.retry_in_s)}"
    return reason


def format_share(state: PoolState) -> str:
    """How much of the model has been loaded: ``45 %``; nothing if the pool does not load, or if that is not known."""
    if state.phase is not PoolPhase.LOADING or not state.load_bytes or state.loaded_bytes is None:
        return ""
    return f"{100 * min(state.loaded_bytes / state.load_bytes, 1.0):.0f} %"


def format_progress(state: PoolState) -> str:
    """How far the loading is, with the rate and the time that is left, as far as they are known; nothing if the pool
    does not load."""
    if state.phase is not PoolPhase.LOADING or state.loaded_bytes is None:
        return ""
    parts = [format_bytes(state.loaded_bytes)]
    if state.load_bytes:
        loaded, whole = parts[0].split(" "), format_bytes(state.load_bytes).split(" ")
        shown_loaded = loaded[0] if loaded[1:] == whole[1:] else " ".join(loaded)  # the unit once
        parts = [f"{format_share(state)}, {shown_loaded} of {' '.join(whole)}"]
    return ", ".join([*parts, *filter(None, [format_rate(state)])])


def format_rate(state: PoolState) -> str:
    """How fast the model is loaded, and the time that is left, as far as they are known: ``105 MiB/s, 3m left``."""
    parts = []
    if state.load_bytes_per_s is not None:
        parts.append(f"{format_bytes(state.load_bytes_per_s)}/s")
    if state.left_s is not None:
        parts.append(f"{format_duration(state.left_s)} left")
    return ", ".join(parts)
