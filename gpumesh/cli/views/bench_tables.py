"""Prints the tables of `bench`: a result with its remarks, and a simulation."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from gpumesh.bench.figures.knee import Knee
from gpumesh.bench.figures.outages.failover_text import failover_sentences
from gpumesh.bench.figures.scaling import Scaling
from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.report.answers.answer import partial_sentence, short_answer
from gpumesh.bench.report.svg import format_number
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.simulate.measures import PolicyResult
from gpumesh.bench.simulate.report import FIGURE_NAMES, SimulationResult, figures
from gpumesh.cli.views.bench_routes import route_lines
from gpumesh.cli.views.bench_server_times import print_server_times
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.cli.views.tables import Cell, Column, print_fitted_table

MAX_NODES_SHOWN = 16  # the spread over more nodes is in the JSON
# The second argument is the rank: columns with a low rank get their place first.
RESULT_COLUMNS = (
    Column("STAGE", min_width=21),
    Column("IN FLIGHT", 6, right=True),
    Column("SERVED", 4, right=True),
    Column("FAILED", 1, right=True),
    Column("TTFT ms", 1, right=True),
    Column("TTFT p90", 7, right=True),
    Column("TPOT ms", 5, right=True),
    Column("E2E ms", 3, right=True),
    Column("E2E p90", 7, right=True),
    Column("TOK/S EACH", 2, right=True),
    Column("TOK/S", 1, right=True),
    Column("REQ/S", 3, right=True),
    Column("GOOD/S", 4, right=True),
    Column("RAMP s", 8, right=True),
    Column("TAIL s", 8, right=True),
)
LIMIT_COLUMN = Column("LIMIT", 1)  # its reason is in the notes


def print_result(result: BenchResult, *, notes: bool) -> None:
    """Prints the table of the stages, and the figures for which it has no column, to stdout; with ``notes`` the
    result's notes to stderr."""
    rows = [_stage_cells(stage, result.knee) for stage in result.stages]
    limits = [_limit_name(stage) for stage in result.stages]
    if any(limits):  # most results have none, and then the column would only take space
        print_fitted_table(
            (*RESULT_COLUMNS, LIMIT_COLUMN),
            [[*row, Cell(name, "yellow")] for row, name in zip(rows, limits, strict=True)],
        )
    else:
        print_fitted_table(RESULT_COLUMNS, rows)
    partial = partial_sentence(result)
    if partial is not None:
        typer.echo(clean_line(partial))
    for line in _result_lines(result):
        typer.echo(clean_line(line))
    print_server_times(result)
    answer = short_answer(result)
    if answer:  # at the end, where the eye is when the command has ended
        typer.echo("")
    for line in answer:
        typer.echo(clean_line(line))
    if notes:
        for note in result.notes:
            typer.echo(f"note: {clean_line(note)}", err=True)


def _limit_name(stage: StageResult) -> str:
    """What limited the stage, if not the servers; empty if nothing did."""
    limit = None if stage.conditions is None else stage.conditions.limit
    return "" if limit is None else limit.value.upper()


def _stage_name(stage: StageResult, *, is_knee: bool) -> str:
    """The name of a stage, marked if it is the knee, or was ended before its end."""
    mark = " (partial)" if stage.partial else " (knee)" if is_knee else ""
    return stage_label(stage) + mark


def _stage_cells(stage: StageResult, knee: Knee | None) -> list[Cell | str]:
    """The row of a stage: a cell for each of ``RESULT_COLUMNS``. The rates are those while all slots were busy.

    The stage of the ``knee`` is marked.
    """
    rates = stage.rates
    is_knee = knee is not None and stage.concurrency == knee.level
    failed = stage.failed + stage.cut  # an answer that was cut is a failure, too
    return [
        _stage_name(stage, is_knee=is_knee),
        "open" if stage.concurrency is None else str(stage.concurrency),
        str(stage.served),
        Cell(str(failed), "red" if failed else "dim"),
        format_number(stage.latency.ttft.p50),
        format_number(stage.latency.ttft.p90),
        format_number(stage.latency.tpot.p50),
        format_number(stage.latency.end_to_end.p50),
        format_number(stage.latency.end_to_end.p90),
        format_number(rates.server.p50),
        format_number(rates.best_tokens_per_s),
        format_number(rates.best_requests_per_s),
        format_number(rates.best_goodput_per_s),
        format_number(rates.ramp_s),
        format_number(rates.tail_s),
    ]


def _result_lines(result: BenchResult) -> Iterator[str]:
    """Yields a line for each figure for which the table has no column: the scaling, the cost of routes, and the lines
    of each stage. ``p50`` is the median."""
    for capacity in result.capacity:
        yield (
            f"capacity of {capacity.node}: {capacity.parallel} at once, {format_number(capacity.tokens_per_s)} tok/s;"
            f" {capacity.reason}"
        )
    if result.knee is not None:
        yield f"knee: {result.knee.text}"
        yield f"at the knee: {result.knee.goodput_text}"
    if result.scaling is not None:
        yield from _scaling_lines(result.scaling)
    yield from route_lines(result)
    if result.failover is not None:
        yield from failover_sentences(result.failover)
    for stage in result.stages:
        yield from _stage_lines(stage)


def _scaling_lines(scaling: Scaling) -> Iterator[str]:
    """Yields the efficiency with its explanation, where the loss of each node went, and what ramp and tail cost."""
    why = f" ({scaling.explanation})" if scaling.explanation is not None else ""
    yield (
        f"scaling: mesh {format_number(scaling.mesh_tokens_per_s)} tok/s of {format_number(scaling.sum_tokens_per_s)} "
        f"that its nodes give alone: {scaling.efficiency:.0%}{why}"
    )
    for loss in scaling.losses:
        yield (
            f"{loss.node}: {format_number(loss.mesh_tokens_per_s)} tok/s of {format_number(loss.alone_tokens_per_s)};"
            f" lost to starved slots {_loss_text(loss.starved_tokens_per_s)},"
            f" slowdown {_loss_text(loss.slowed_tokens_per_s)}, swaps {_loss_text(loss.swapped_tokens_per_s)}"
        )
    if scaling.tail_share is not None:
        yield f"ramp and tail would cost a batch of just these requests another {scaling.tail_share:.0%}"


def _loss_text(tokens_per_s: float) -> str:
    """A loss with one decimal. What rounds to zero has no sign."""
    return f"{round(tokens_per_s, 1) + 0.0:.1f}"


def _stage_lines(stage: StageResult) -> Iterator[str]:
    """Yields a line for each phase of the stage, and one for the GPUs if their power is known."""
    for phase in stage.phases:
        yield (
            f"{phase.name}: {phase.requests} sent, {phase.failed} failed, {phase.retried} retried, "
            f"end-to-end p50 {format_number(phase.end_to_end.p50)} ms,"
            f" longest gap {format_number(phase.longest_gap_ms)} ms, "
            f"{format_number(phase.output_tokens_per_s)} tok/s"
        )
    if stage.gpu is not None:
        yield (
            f"{stage_label(stage)}: {format_number(stage.gpu.utilization_pct)} % GPU,"
            f" {format_number(stage.gpu.power_w)} W, "
            f"{format_number(stage.tokens_per_joule)} tokens/J"
        )


# The ranks of the columns of ``FIGURE_NAMES``: on a narrow screen the last ones are left out.
_SIMULATION_RANKS = (0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 2)


def print_simulation(result: SimulationResult, *, notes: bool) -> None:
    """Prints the table of the policies, and how the requests were spread over the nodes, to stdout; with ``notes`` what
    was simulated to stderr."""
    # Only the first column is text, the policy's name. It has rank 0.
    columns = [Column(name, rank, right=rank > 0) for name, rank in zip(FIGURE_NAMES, _SIMULATION_RANKS, strict=True)]
    print_fitted_table(columns, [figures(policy) for policy in result.policies])
    for policy in result.policies:
        for line in _policy_lines(policy):
            typer.echo(clean_line(line))
    if notes:
        typer.echo(
            clean_line(
                f"note: {result.workload}: {result.requests:,} requests, {format_number(result.offered_per_s)} a second"
                f" of {format_number(result.capacity_per_s)} that the fleet can serve"
            ),
            err=True,
        )


def _policy_lines(policy: PolicyResult) -> Iterator[str]:
    """Yields how the requests were spread over the nodes, and the times of each class and client if there are
    several."""
    if 1 < len(policy.nodes) <= MAX_NODES_SHOWN:  # the share is ``None`` if no node has served a request
        yield f"{policy.policy}: " + ", ".join(f"{node.name} {node.share or 0.0:.0%}" for node in policy.nodes)
    clients = sorted(policy.completion_by_client.items(), key=lambda group: (len(group[0]), group[0]))  # 2 before 10
    for groups in (list(policy.completion_by_priority.items()), clients):
        if len(groups) > 1:
            parts = [
                f"{name} mean {format_number(summary.mean)} s, p99 {format_number(summary.p99)} s"
                for name, summary in groups
            ]
            yield f"{policy.policy}: " + "; ".join(parts)
