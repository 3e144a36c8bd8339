"""`gpumesh bench`: measure, look at what was measured, compare. Progress goes to stderr, only the result to stdout."""

from __future__ import annotations

import itertools
import time
from contextlib import AbstractAsyncContextManager, ExitStack
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.context import GlobalOptions, global_options, open_session, run_async
from gpumesh.cli.lazy import new_app
from gpumesh.cli.text import clean_line, json_text
from gpumesh.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpumesh.backends.base import ChatRequest
    from gpumesh.bench import scenarios
    from gpumesh.bench.load import AnswerStream, RequestRecord, SendPrompt
    from gpumesh.bench.result import BenchResult
    from gpumesh.bench.routes import ApiKeys
    from gpumesh.bench.run import BenchOutput
    from gpumesh.bench.stats import Objective
    from gpumesh.bench.traces import TracedRequest
    from gpumesh.daemon.session import Session
    from gpumesh.state import MeshState
    from gpumesh.topology import Topology

# Every node is measured, so that all are waited for: a connect's own deadline and a probe.
FIRST_REPORT_TIMEOUT_S = 7.0

app = new_app(no_args_is_help=True, help="Measure latency and throughput, per node and for the mesh.")

OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the result goes.")]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON (schema gpumesh.bench/1).")]


@app.command()
def run(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Which model.", autocompletion=completion.complete_models)
    ] = None,
    scenario: Annotated[
        str,
        typer.Option(
            help="quick, sweep, scale, overhead, failover or replay.",
            metavar="NAME",
            autocompletion=completion.complete_scenarios,
        ),
    ] = "quick",
    requests: Annotated[int | None, typer.Option("-n", metavar="N", help="Requests in each stage.")] = None,
    concurrency: Annotated[
        str | None, typer.Option("--concurrency", "-c", metavar="N[,N…]", help="Requests in flight; sweep: the levels.")
    ] = None,
    node: Annotated[
        str | None,
        typer.Option(metavar="NODE", help="Measure this node only.", autocompletion=completion.complete_nodes),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate for each request.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompts, about.")] = 32,
    think: Annotated[bool, typer.Option("--think/--no-think", help="Whether a model that can shall think.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the servers' sampling.")] = 1,
    slo_ttft: Annotated[float, typer.Option(metavar="MS", help="Goodput: time to first token at most.")] = 2000.0,
    slo_tpot: Annotated[float, typer.Option(metavar="MS", help="Goodput: time per output token at most.")] = 200.0,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="replay: Azure's CSV or Mooncake's JSONL.")] = None,
    speed: Annotated[float, typer.Option(help="replay: so many times as fast.")] = 1.0,
    out: OutOption = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a result that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Send prompts and measure: on the running mesh, or on one opened for it.

    quick: each node alone, then all together. sweep: rising concurrency. scale: mesh against the sum of its nodes.
    overhead: what tunnel, mesh and gateway add. failover: a node is drained under load. replay: a public trace.

    \b
    Examples:
      gpumesh bench run
      gpumesh bench run --scenario sweep -c 1,2,4,8,16 -m qwen2.5:7b --out sweep-1
      gpumesh bench run --scenario replay --trace azure_conv_2023.csv -n 200 --speed 4
    """
    from gpumesh.bench.result import result_json
    from gpumesh.bench.result_folder import check_result_folder, write_result
    from gpumesh.bench.stats import Objective

    chosen = global_options(ctx)
    wanted = _scenario(scenario)
    traced = _trace(trace, requests)
    levels = _levels(concurrency)
    folder = out or _new_folder(wanted)
    check_result_folder(folder, force=force)

    def configured(name: str) -> scenarios.BenchSettings:
        from gpumesh.bench.scenarios import BenchSettings

        return BenchSettings(name, requests, levels, tokens, prompt_tokens, think, seed, speed)

    try:
        done = run_async(
            _measure(chosen, wanted, model, configured, Objective(slo_ttft, slo_tpot), trace=traced, node=node)
        )
    finally:
        _drop_if_empty(folder)
    write_result(folder, done.result, done.records, force=force)
    if as_json:
        typer.echo(json_text(result_json(done.result), indent=2))
    else:
        _show(done.result, notes=not chosen.quiet)
    if not chosen.quiet:
        typer.echo(f"result in {folder} (report.html opens in a browser)", err=True)
    if done.result.failed:
        if not chosen.quiet:
            many = "1 request" if done.result.failed == 1 else f"{done.result.failed} requests"
            typer.echo(f"{many} failed; the report says why", err=True)
        raise typer.Exit(int(ExitCode.FAILED))


@app.command()
def show(
    ctx: typer.Context,
    path: Annotated[Path | None, typer.Argument(metavar="[RESULT]", help="A result's folder; else the latest.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a result again."""
    from gpumesh.bench.result import result_json
    from gpumesh.bench.result_folder import find_newest_result, read_result

    folder = path or find_newest_result(_results())
    if folder is None:
        raise UsageError("nothing was measured yet", hint="`gpumesh bench run` does it")
    result = read_result(folder)
    if as_json:
        typer.echo(json_text(result_json(result), indent=2))
        return
    _show(result, notes=not global_options(ctx).quiet)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A result's folder: the one before.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="A result's folder: the one after.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two results: what became better or worse, and what the samples cannot tell apart."""
    from gpumesh.bench.compare import DifferenceVerdict
    from gpumesh.bench.compare import compare as compared
    from gpumesh.bench.result_folder import read_result
    from gpumesh.bench.svg import format_number
    from gpumesh.cli.views import tables
    from gpumesh.wire import to_json

    found = compared(read_result(a), read_result(b))
    if as_json:
        typer.echo(json_text({"schema": "gpumesh.bench-compare/1", **to_json(found)}, indent=2))
        return
    styles = {
        DifferenceVerdict.BETTER: "green",
        DifferenceVerdict.WORSE: "red",
        DifferenceVerdict.SAME: "dim",
        DifferenceVerdict.UNKNOWN: "dim",
    }
    said = {DifferenceVerdict.SAME: "no clear difference", DifferenceVerdict.UNKNOWN: "too few to tell"}
    tables.print_table(
        ["stage", "figure", "A", "B", "B ÷ A", ""],
        [
            [
                difference.stage,
                f"{difference.figure} ({difference.unit})" if difference.unit else difference.figure,
                format_number(difference.a),
                format_number(difference.b),
                format_number(difference.ratio),
                tables.Cell(said.get(difference.verdict, difference.verdict.value), styles[difference.verdict]),
            ]
            for difference in found.differences
        ],
    )
    missing = [f"only in A: {name}" for name in found.only_a] + [f"only in B: {name}" for name in found.only_b]
    for line in (*found.caveats, *missing):
        typer.echo(f"note: {clean_line(line)}", err=True)


# -- what the options say --------------------------------------------------------------------------------------------


def _scenario(name: str) -> scenarios.Scenario:
    from gpumesh.bench.scenarios import Scenario

    try:
        return Scenario(name)
    except ValueError:
        raise UsageError(f"--scenario {name!r} is none of: {', '.join(Scenario)}") from None


def _levels(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        levels = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"-c {text!r} is not a list of numbers", hint="e.g. -c 1,2,4,8") from None
    if min(levels) < 1 or max(levels) > 4096:
        raise UsageError(f"-c {text!r}: from 1 to 4096 requests in flight")
    return levels


def _trace(file: Path | None, limit: int | None) -> Sequence[TracedRequest]:
    if file is None:
        return ()
    from gpumesh.bench import traces

    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            return traces.parse_trace(lines, file=str(file), limit=limit)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror or error}") from error


def _results() -> Path:
    from gpumesh.config import environment

    return environment.state_dir() / "bench"


def _new_folder(scenario: scenarios.Scenario) -> Path:
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{scenario}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(folder for folder in (_results() / one for one in names) if not folder.exists())


def _drop_if_empty(folder: Path) -> None:
    """A run that was ended before its result leaves no empty folder behind."""
    try:
        if not any(folder.iterdir()):
            folder.rmdir()
    except OSError:
        pass  # somebody put something there, or took it away: it is theirs


# -- measuring -------------------------------------------------------------------------------------------------------


async def _measure(
    chosen: GlobalOptions,
    scenario: scenarios.Scenario,
    model: str | None,
    configured: Callable[[str], scenarios.BenchSettings],
    objective: Objective,
    *,
    trace: Sequence[TracedRequest],
    node: str | None,
) -> BenchOutput:
    from gpumesh.bench import run as bench
    from gpumesh.daemon.local_session import LocalSession
    from gpumesh.mesh.models.default_model import choose_model

    default = model or chosen.topology().gateway.default_model
    async with open_session(chosen) as session:
        state = await session.wait_first_report(FIRST_REPORT_TIMEOUT_S)
        name = default or choose_model(state, node)
        target = _SessionTarget(session, embedded=isinstance(session, LocalSession))
        with ExitStack() as stack:
            return await bench.run_benchmark(
                target,
                scenario,
                configured(name),
                progress=_Progress(stack, quiet=chosen.quiet),
                rng=Random(time.time_ns()),
                objective=objective,
                trace=trace,
                only_node=node,
                keys=_keys(chosen.topology()),
            )


def _keys(topology: Topology) -> ApiKeys:
    """Those whose variables are set. A server that gets none says so itself."""
    from gpumesh import config
    from gpumesh.bench.routes import ApiKeys
    from gpumesh.errors import SecretMissing

    def value(variable: str | None) -> str | None:
        try:
            return None if variable is None else config.read_secret(variable)
        except SecretMissing:
            return None

    found = {node.name: value(node.backend.api_key_env) for node in topology.nodes}
    return ApiKeys(value(topology.gateway.api_key_env), {name: key for name, key in found.items() if key is not None})


class _SessionTarget:
    """The mesh behind a session, as a benchmark sees it."""

    def __init__(self, session: Session, *, embedded: bool) -> None:
        self._session = session
        self.embedded = embedded

    def send(self) -> SendPrompt:
        return self._send

    def _send(self, request: ChatRequest, node: str | None) -> AbstractAsyncContextManager[AnswerStream]:
        from gpumesh.balancer.base import Priority
        from gpumesh.daemon.session import PromptRequest

        ask = PromptRequest(
            request.messages,
            model=request.model,
            node=node,
            priority=Priority.NORMAL,
            options=request.options,
            stream=request.stream,
            think=request.think,
        )
        return self._session.chat(ask)

    async def status(self) -> MeshState:
        return await self._session.status()

    async def drain(self, node: str) -> None:
        await self._session.drain(node)

    async def resume(self, node: str) -> None:
        await self._session.resume(node)


class _Progress:
    """A bar on stderr: requests that have ended, and the stage that is running."""

    def __init__(self, stack: ExitStack, *, quiet: bool) -> None:
        self._stack = stack
        self._quiet = quiet
        self._tick: Callable[[int, str], None] = lambda _done, _note: None
        self._stage = ""
        self._done = 0
        self._failed = 0

    def set_plan(self, plan: scenarios.Plan) -> None:
        from gpumesh.cli.views import tables

        self._tick = self._stack.enter_context(tables.show_progress(plan.total, "requests", quiet=self._quiet))

    def start_stage(self, stage: scenarios.Stage) -> None:
        self._stage = stage.name
        self._tick(self._done, self._stage)

    def add_record(self, record: RequestRecord) -> None:
        self._done += 1
        self._failed += record.error_code is not None
        failed = f", {self._failed} failed" if self._failed else ""
        self._tick(self._done, f"{self._stage}{failed}")


# -- showing ---------------------------------------------------------------------------------------------------------


def _show(result: BenchResult, *, notes: bool = True) -> None:
    from gpumesh.bench.summary import stage_label
    from gpumesh.bench.svg import format_number
    from gpumesh.cli.views import tables

    column = tables.Column
    tables.print_fitted_table(
        [
            column("STAGE", min_width=21),
            column("IN FLIGHT", 6, right=True),
            column("SERVED", 4, right=True),
            column("FAILED", 1, right=True),
            column("TTFT ms", 1, right=True),
            column("TTFT p90", 7, right=True),
            column("TPOT ms", 5, right=True),
            column("E2E ms", 3, right=True),
            column("E2E p90", 7, right=True),
            column("TOK/S EACH", 2, right=True),
            column("TOK/S", 1, right=True),
            column("REQ/S", 3, right=True),
        ],
        [
            [
                stage_label(stage),
                "open" if stage.concurrency is None else str(stage.concurrency),
                str(stage.served),
                tables.Cell(str(stage.failed + stage.cut), "red" if stage.failed + stage.cut else "dim"),
                format_number(stage.latency.ttft.p50),
                format_number(stage.latency.ttft.p90),
                format_number(stage.latency.tpot.p50),
                format_number(stage.latency.end_to_end.p50),
                format_number(stage.latency.end_to_end.p90),
                format_number(stage.rates.server.p50),
                format_number(stage.rates.output_tokens_per_s),
                format_number(stage.rates.requests_per_s),
            ]
            for stage in result.stages
        ],
    )
    for line in _lines(result):
        typer.echo(clean_line(line))
    if notes:
        for note in result.notes:
            typer.echo(f"note: {clean_line(note)}", err=True)


def _lines(result: BenchResult) -> list[str]:
    """What the table has no column for; its figures without a name are at p50."""
    from gpumesh.bench.summary import stage_label
    from gpumesh.bench.svg import format_number

    lines = []
    if result.scaling is not None:
        scaling = result.scaling
        lines.append(
            f"scaling: mesh {format_number(scaling.mesh_tokens_per_s)} tok/s"
            f" of {format_number(scaling.sum_tokens_per_s)} "
            f"that its nodes give alone: {scaling.efficiency:.0%}"
        )
    for node, costs in itertools.groupby(result.routes, key=lambda cost: cost.node):
        barest, *others = costs
        way = f"{format_number(barest.outside_server_p50_ms)} ms outside the server at p50 through the {barest.route}"
        lines.append(
            "; ".join([f"{node}: {way}", *(f"{one.route} adds {format_number(one.added_p50_ms)} ms" for one in others)])
        )
    for stage in result.stages:
        lines.extend(
            f"{phase.name}: {phase.requests} sent, {phase.failed} failed, {phase.retried} retried, "
            f"end-to-end p50 {format_number(phase.end_to_end.p50)} ms,"
            f" longest gap {format_number(phase.longest_gap_ms)} ms, "
            f"{format_number(phase.output_tokens_per_s)} tok/s"
            for phase in stage.phases
        )
        if stage.gpu is not None and stage.gpu.power_w is not None:
            lines.append(
                f"{stage_label(stage)}: {format_number(stage.gpu.utilization_pct)} % GPU,"
                f" {format_number(stage.gpu.power_w)} W, "
                f"{format_number(stage.tokens_per_joule)} tokens/J"
            )
    return lines
