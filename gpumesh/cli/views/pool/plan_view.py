"""Draws the plan of a pool: the layers on each device, what its memory is used for, the forecast, and what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gpumesh.cli.views.console import console, print_plain
from gpumesh.cli.views.figures import UNKNOWN, format_bytes, format_duration, format_milliseconds, short_gpu
from gpumesh.cli.views.findings import make_notes_table
from gpumesh.cli.views.pool.bars import bar_legend, layer_bar, layer_range, memory_bar, memory_use
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.cli.views.tables import Column, ColumnCells, fit_table
from gpumesh.pools.base import DeviceOffer, DeviceShare, MemberPlan, PathKind, PoolPlan, SpeedForecast, WorkerPath

LABEL_WIDTH = 9  # characters of the longest label of the facts
# Pairs: the least width of a terminal, and the length of bars on it, both in characters.
_BAR_LENGTHS = ((150, 24), (110, 16), (80, 10), (0, 6))
_PATHS = {
    PathKind.LOCAL: "on the head's host",
    PathKind.THROUGH_US: "through this machine",
    PathKind.HEAD_TO_WORKER: "straight from the head",
}


def print_plan(plan: PoolPlan) -> None:
    """Prints the plan to stdout."""
    out = console()
    print_plain(out, Group(*_draw_plan(plan, out.width)))


def _draw_plan(plan: PoolPlan, width: int) -> Iterator[RenderableType]:
    mark, style = ("●", "green") if plan.fits else ("✗", "red")
    head = Text.assemble((mark, style), " ", (clean_line(plan.pool, 63), "bold"), f"  {clean_line(plan.model, 200)}  ")
    yield head.append("fits" if plan.fits else "does not fit", style=style)
    if plan.members:
        yield Text()
        yield _share_table(plan, width)
        yield bar_legend([memory_use(share) for member in plan.members for share in member.shares])
    yield Text()
    yield draw_facts(list(_list_facts(plan)))
    notes = [(Text("✗", style="red"), Text(clean_line(problem))) for problem in plan.problems]
    notes += [(Text("→", style="cyan"), Text(clean_line(advice))) for advice in plan.advice]
    if notes:
        yield Text()
        yield make_notes_table(notes)


def draw_facts(facts: Sequence[tuple[str, str]]) -> Table:
    """A label on the left, its text on the right. A label that repeats the one above is left out."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, width=LABEL_WIDTH, style="dim")
    table.add_column(overflow="fold")
    previous_label = None
    for label, text in facts:
        table.add_row(Text("" if label == previous_label else label), Text(clean_line(text)))
        previous_label = label
    return table


# -- the table of devices --------------------------------------------------------------------------------------------


# Of a member that offers no device.
_NO_SHARE = DeviceShare(DeviceOffer(UNKNOWN, None, None, 0), 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class _Row:
    """A device of a member. ``first``: it is the member's first, which also shows what holds for the whole member."""

    member: MemberPlan
    share: DeviceShare
    first: bool


def _share_table(plan: PoolPlan, width: int) -> Table:
    """A row for each device, and as many columns as there is room for."""
    length = next(length for least_width, length in _BAR_LENGTHS if width >= least_width)
    rows = [
        _Row(member, share, first=position == 0)
        for member in plan.members
        for position, share in enumerate(member.shares or (_NO_SHARE,))
    ]
    all_layers = plan.shape.layers + 1  # the output counts as one

    def layers_cell(row: _Row) -> Text:
        share = row.share
        return layer_bar(share.first_layer, share.layers, all_layers, length).append(f" {layer_range(share)}")

    def column(column: Column, draw_cell: Callable[[_Row], Text | str], *, of_member: bool = False) -> ColumnCells:
        """The cells of one column. ``of_member``: only the member's first row has one."""
        cells = [draw_cell(row) if row.first or not of_member else "" for row in rows]
        return column, [cell if isinstance(cell, Text) else Text(cell) for cell in cells]

    return fit_table(
        [
            column(Column("NODE", min_width=12), lambda row: clean_line(row.member.node, 63), of_member=True),
            column(Column("DEVICE", 4, min_width=10), _device_cell),
            column(Column("LAYERS"), layers_cell),
            column(Column("MEMORY", 1), lambda row: memory_bar(memory_use(row.share), length)),
            column(Column("NEEDS", right=True), _needs_cell),
            column(Column("MAY TAKE", 1, right=True), lambda row: format_bytes(row.share.offered_bytes)),
            column(Column("WEIGHTS", 6, right=True), lambda row: format_bytes(row.share.weights_bytes)),
            column(Column("KV CACHE", 6, right=True), lambda row: format_bytes(row.share.kv_bytes)),
            column(Column("COMPUTE", 6, right=True), lambda row: format_bytes(row.share.compute_bytes)),
            column(Column("TO HEAD", 2, right=True), lambda row: _way_to_head(row.member), of_member=True),
            column(Column("PATH", 5), lambda row: describe_path(row.member.path), of_member=True),
        ],
        width,
    )


def _device_cell(row: _Row) -> str:
    """The name of the device, after its index if the node has several."""
    device = row.share.device
    name = short_gpu(clean_line(device.name, 40))
    has_index = device.index is not None and len(row.member.shares) > 1
    return f"{device.index} {name}" if has_index else name


def _needs_cell(row: _Row) -> Text:
    """What the share needs, in red if that is more than it may take."""
    share = row.share
    return Text(format_bytes(share.needed_bytes), style="red" if share.needed_bytes > share.offered_bytes else "")


def _way_to_head(member: MemberPlan) -> Text:
    """The round trip between the head and a worker."""
    return Text("is head", style="bold") if member.is_head else Text(format_round_trip(member.path))


def format_round_trip(path: WorkerPath | None) -> str:
    return UNKNOWN if path is None else format_milliseconds(path.rtt_ms)


def describe_path(path: WorkerPath | None) -> str:
    """The way of the data between the head and a worker, and its rate if that is known; nothing for the head."""
    if path is None:
        return ""
    rate = "" if path.bytes_per_s is None else f", {format_bytes(path.bytes_per_s)}/s"
    return f"{_PATHS[path.kind]}{rate}"


# -- the facts -------------------------------------------------------------------------------------------------------


def _list_facts(plan: PoolPlan) -> Iterator[tuple[str, str]]:
    shape = plan.shape
    parts = [shape.file_type, _format_parameters(shape.parameters), f"{shape.layers} layers"]
    parts.append(format_bytes(shape.file_bytes))
    if shape.trained_context is not None:
        parts.append(f"trained for {shape.trained_context} tokens")
    yield "model", ", ".join(part for part in parts if part)
    streams = "one stream" if plan.parallel == 1 else f"{plan.parallel} streams at once"
    yield "context", f"{plan.context} tokens, {streams}, KV cache {plan.kv_type}"
    if plan.load_s is not None or plan.sent_bytes is not None:
        yield "load", _describe_load(plan)
    if plan.speed is not None:
        yield from speed_facts(plan.speed)
    elif plan.fits:
        yield "speed", "not known: how fast a device reads its memory is not known"
    if plan.draft is not None:
        draft = plan.draft
        name = draft.name or draft.architecture
        yield "draft", f"{name}, {format_bytes(draft.file_bytes)}, on the head"


def _format_parameters(count: int) -> str:
    return f"{count / 1e9:.1f} B parameters" if count >= 1e9 else f"{count / 1e6:.0f} M parameters"


def _describe_load(plan: PoolPlan) -> str:
    duration = UNKNOWN if plan.load_s is None else f"in about {format_duration(plan.load_s)}"
    workers = ", ".join(member.node for member in plan.workers)
    if not plan.sent_bytes or not workers:
        return duration
    return f"{duration}; {format_bytes(plan.sent_bytes)} go to {workers}, at the first time"


def speed_facts(speed: SpeedForecast, label: str = "speed") -> Iterator[tuple[str, str]]:
    """The forecast in words, each line under ``label``: the rates, and what a token waits for."""
    together = "" if speed.streams == 1 else f", {speed.tokens_per_s_streams:.1f} for {speed.streams} together"
    yield label, f"{speed.tokens_per_s:.1f} tokens/s for one stream{together}"
    token_ms = speed.compute_ms + speed.round_trips_ms
    shares = f"of the {format_milliseconds(token_ms)} for a token, {format_milliseconds(speed.round_trips_ms)}"
    yield label, f"{shares} are round trips"
    if speed.draft_tokens_per_s is not None:
        condition = ""
        if speed.draft_acceptance is not None:
            condition = f", if {100 * speed.draft_acceptance:.0f} % of its tokens are accepted"
        yield label, f"{speed.draft_tokens_per_s:.1f} tokens/s for one stream with a draft model{condition}"
