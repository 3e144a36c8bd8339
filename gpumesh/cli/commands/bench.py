"""`gpumesh bench`: measures latency and throughput, shows a result again, compares two results.

Progress goes to stderr, only the result to stdout. Further parts of the command are in `cli/bench/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.bench import bench_options
from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import global_options
from gpumesh.cli.json_output import json_option, print_json
from gpumesh.cli.open_session import run_async
from gpumesh.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from gpumesh.bench import scenarios

app = new_app(no_args_is_help=True, help="Measure latency and throughput, per node and for the mesh.")

OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the result goes.")]
JsonOption = Annotated[bool, json_option("As JSON (schema gpumesh.bench/1).")]


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
    from gpumesh.cli.bench.measure import measure
    from gpumesh.cli.views import bench_tables

    options = global_options(ctx)
    chosen_scenario = bench_options.parse_scenario(scenario)
    traced_requests = bench_options.read_trace(trace, requests)
    levels = bench_options.parse_levels(concurrency)
    folder = out or bench_options.new_result_folder(chosen_scenario)
    check_result_folder(folder, force=force)

    def make_settings(model_name: str) -> scenarios.BenchSettings:
        from gpumesh.bench.scenarios import BenchSettings

        return BenchSettings(
            model_name,
            requests=requests,
            concurrency=levels,
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            think=think,
            seed=seed,
            speed=speed,
        )

    objective = Objective(slo_ttft, slo_tpot)
    try:
        output = run_async(
            measure(options, chosen_scenario, model, make_settings, objective, trace=traced_requests, node=node)
        )
    finally:
        bench_options.remove_if_empty(folder)  # ``write_result`` makes it again; without a result it must not stay
    result = output.result
    write_result(folder, result, output.records, force=force)
    if as_json:
        print_json(result_json(result))
    else:
        bench_tables.print_result(result, notes=not options.quiet)
    if not options.quiet:
        typer.echo(f"result in {folder} (report.html opens in a browser)", err=True)
    if result.failed:
        if not options.quiet:
            failed_text = "1 request" if result.failed == 1 else f"{result.failed} requests"
            typer.echo(f"{failed_text} failed; the report says why", err=True)
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
    from gpumesh.cli.views import bench_tables

    folder = path or find_newest_result(bench_options.results_folder())
    if folder is None:
        raise UsageError("nothing was measured yet", hint="`gpumesh bench run` does it")
    result = read_result(folder)
    if as_json:
        print_json(result_json(result))
        return
    bench_tables.print_result(result, notes=not global_options(ctx).quiet)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A result's folder: the one before.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="A result's folder: the one after.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two results: what became better or worse, and what the samples cannot tell apart."""
    from gpumesh.bench.compare import compare as compare_results
    from gpumesh.bench.result_folder import read_result
    from gpumesh.cli.views import bench_tables
    from gpumesh.wire import to_json

    comparison = compare_results(read_result(a), read_result(b))
    if as_json:
        print_json({"schema": "gpumesh.bench-compare/1", **to_json(comparison)})
    else:
        bench_tables.print_comparison(comparison)
