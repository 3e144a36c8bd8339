"""`gpumesh bench`: measures latency and throughput, and simulates a fleet.

The commands on results (show, list, compare, export) are in ``cli/bench/results_commands.py``, further parts of
`run` in ``cli/bench/``. Progress goes to stderr, only the result to stdout.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.bench import bench_options, results_commands, scenario_options
from gpumesh.cli.command_group import new_app
from gpumesh.cli.duration_option import DURATION_METAVAR, duration_parser
from gpumesh.cli.global_options import global_options
from gpumesh.cli.json_output import json_option, print_json
from gpumesh.cli.open_session import run_async
from gpumesh.errors import UsageError

if TYPE_CHECKING:
    from gpumesh.bench.workload.settings import BenchSettings

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
        str | None,
        typer.Option(
            help="quick (default), sweep, scale, overhead, failover, replay or load.",
            metavar="NAME",
            autocompletion=completion.complete_scenarios,
        ),
    ] = None,
    requests: Annotated[int | None, typer.Option("-n", metavar="N", help="Requests in each stage.")] = None,
    concurrency: Annotated[
        str | None, typer.Option("--concurrency", "-c", metavar="N[,N…]", help="Requests in flight; sweep: the levels.")
    ] = None,
    node: Annotated[
        str | None,
        typer.Option(metavar="NODE", help="Measure this node only.", autocompletion=completion.complete_nodes),
    ] = None,
    via: Annotated[
        str | None, typer.Option(metavar="WAY", help="gateway (default: as clients do), mesh, or direct (past both).")
    ] = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="Measure this server, without a mesh.")] = None,
    api: Annotated[str | None, typer.Option(metavar="API", help="With --url: ollama, openai or anthropic.")] = None,
    key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --url: the variable that holds the API key.")
    ] = None,
    tokens: Annotated[
        str, typer.Option(metavar="N|A-B|N:D", help="Tokens to generate: equal, uniform, or normal.")
    ] = "64",
    prompt_tokens: Annotated[str, typer.Option(metavar="N|A-B|N:D", help="Length of the prompts, about.")] = "32",
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="load: your own prompts, in the form that `run -f` reads.")
    ] = None,
    rate: Annotated[float | None, typer.Option(metavar="PER_S", help="load: requests a second (open loop).")] = None,
    arrivals: Annotated[str, typer.Option(metavar="P", help="With --rate: constant, poisson, or burst:N.")] = "poisson",
    duration: Annotated[
        float | None,
        typer.Option(
            metavar=DURATION_METAVAR, parser=duration_parser(0.1), help="load: for so long; else -n requests."
        ),
    ] = None,
    turns: Annotated[int, typer.Option(metavar="N", help="load: turns of each conversation.")] = 1,
    think_time: Annotated[
        float,
        typer.Option(
            metavar=DURATION_METAVAR, parser=duration_parser(0.0), help="load: between an answer and the next turn."
        ),
    ] = 0.0,
    system_tokens: Annotated[
        int, typer.Option(metavar="N", help="load: length of a system prompt that all share.")
    ] = 0,
    think: Annotated[bool, typer.Option("--think/--no-think", help="Whether a model that can shall think.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the servers' sampling.")] = 1,
    slo_ttft: Annotated[float, typer.Option(metavar="MS", help="Goodput: time to first token at most.")] = 2000.0,
    slo_tpot: Annotated[float, typer.Option(metavar="MS", help="Goodput: time per output token at most.")] = 200.0,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="replay: Azure's CSV or Mooncake's JSONL.")] = None,
    speed: Annotated[float, typer.Option(help="replay: so many times as fast.")] = 1.0,
    direct: Annotated[
        list[str] | None,
        typer.Option(metavar="NODE=URL", help="overhead: the node's server without its tunnel, to tell that apart."),
    ] = None,
    price_kwh: Annotated[
        float | None, typer.Option("--price-kwh", metavar="EUR", min=0, help="For the energy of a million tokens.")
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=1, max=100, metavar="N", help="Run it N times: `compare` needs the spread between runs.")
    ] = 1,
    by: Annotated[
        str | None,
        typer.Option(metavar="HOW", help="failover: tunnel (cut ours; the default), server (stop it) or drain."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="NODE",
            help="failover: which node goes away; else the busiest.",
            autocompletion=completion.complete_nodes,
        ),
    ] = None,
    stop_command: Annotated[
        str | None, typer.Option(metavar="CMD", help="--by server: stops it, in a shell on its host.")
    ] = None,
    start_command: Annotated[str | None, typer.Option(metavar="CMD", help="--by server: starts it again.")] = None,
    out: OutOption = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a result that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Send prompts and measure: on the running mesh, or on one opened for it.

    quick: each node alone, then all together. sweep: rising concurrency, past the capacity. scale: mesh against the
    sum of its nodes, each at its capacity.
    overhead: what tunnel, mesh and gateway add. failover: a node goes away under load (--by). replay: a public trace.
    load: your own shape of load, with --rate, --duration or --prompts.

    \b
    Examples:
      gpumesh bench run
      gpumesh bench run --scenario sweep -c 1,2,4,8,16 -m qwen2.5:7b --out sweep-1
      gpumesh bench run --scenario replay --trace azure_conv_2023.csv -n 200 --speed 4
      gpumesh bench run --url http://127.0.0.1:8000 --api openai -m qwen2.5-7b --scenario sweep
      gpumesh bench run --rate 4 --duration 2m --prompt-tokens 100-800 --tokens 200:60
    """
    from gpumesh.bench.repeated_journal import RepeatedJournal
    from gpumesh.bench.result_folder import check_result_folder
    from gpumesh.bench.result_journal import ResultJournal
    from gpumesh.bench.stats import Objective
    from gpumesh.cli.bench import load_way, present_result, url_options
    from gpumesh.cli.bench.measure import measure, measure_url

    options = global_options(ctx)
    has_load_option = turns != 1 or system_tokens > 0 or any(value is not None for value in (rate, duration, prompts))
    chosen_scenario = bench_options.parse_scenario(scenario or ("load" if has_load_option else "quick"))
    if has_load_option and chosen_scenario != "load":
        raise UsageError(
            "--rate, --duration, --prompts, --turns and --system-tokens are for --scenario load, "
            f"not for {chosen_scenario}"
        )
    answer_lengths = bench_options.parse_lengths("--tokens", tokens)
    prompt_lengths = bench_options.parse_lengths("--prompt-tokens", prompt_tokens)
    process, burst = bench_options.parse_arrivals(arrivals)
    own_prompts = bench_options.read_own_prompts(prompts)
    traced_requests = bench_options.read_trace(trace, requests)
    levels = bench_options.parse_levels(concurrency)
    direct_urls = scenario_options.parse_direct_urls(direct or ())
    outage = scenario_options.parse_outage(by, on, stop_command, start_command)
    scenario_options.check_scenario(chosen_scenario, direct_urls=direct_urls, outage=outage)
    chosen_via = load_way.parse_via(via)
    server = url_options.parse_url_options(url, api, key_env, scenario=chosen_scenario, model=model, node=node, via=via)
    folder = out or bench_options.new_result_folder(chosen_scenario)
    check_result_folder(folder, force=force)

    def make_settings(model_name: str) -> BenchSettings:
        from gpumesh.bench.workload.settings import BenchSettings

        return BenchSettings(
            model_name,
            requests=requests,
            concurrency=levels,
            tokens=round(answer_lengths.mean),
            prompt_tokens=round(prompt_lengths.mean),
            think=think,
            seed=seed,
            speed=speed,
            answer_lengths=None if answer_lengths.is_fixed else answer_lengths,
            prompt_lengths=None if prompt_lengths.is_fixed else prompt_lengths,
            rate=rate,
            arrivals=process,
            burst=burst,
            duration_s=duration,
            turns=turns,
            think_s=think_time,
            system_tokens=system_tokens,
        )

    objective = Objective(slo_ttft, slo_tpot)
    journal = ResultJournal(folder) if repeat == 1 else RepeatedJournal(folder)
    if server is not None:
        measurement = measure_url(
            options,
            server,
            chosen_scenario,
            make_settings(model or ""),  # with --url there is a model
            objective,
            trace=traced_requests,
            own_prompts=own_prompts,
            repeat=repeat,
            keep=journal.keep,
        )
    else:
        measurement = measure(
            options,
            chosen_scenario,
            model,
            make_settings,
            objective,
            trace=traced_requests,
            own_prompts=own_prompts,
            node=node,
            direct_urls=direct_urls,
            outage=outage,
            via=chosen_via,
            eur_per_kwh=price_kwh,
            repeat=repeat,
            keep=journal.keep,
        )
    try:
        run_async(measurement, use_uvloop=True)
    except BaseException as error:  # a signal, or an error such as the mesh's end: it is raised again
        present_result.present_partial_result(journal, folder, error, as_json=as_json, quiet=options.quiet)
        raise
    present_result.present_result(journal, folder, as_json=as_json, quiet=options.quiet)


results_commands.add_commands(app)


@app.command()
def simulate(
    ctx: typer.Context,
    fleet: Annotated[Path, typer.Option("--fleet", metavar="FILE", help="The simulated nodes, as YAML.")],
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Azure's CSV or Mooncake's JSONL.")] = None,
    poisson: Annotated[float | None, typer.Option(metavar="RATE", help="Requests a second, at random.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="P", help="A policy, or reference; else all.", autocompletion=completion.complete_policies
        ),
    ] = None,
    requests: Annotated[
        int | None, typer.Option("-n", metavar="N", min=1, help="How many; else the trace's, or 10000.")
    ] = None,
    load: Annotated[float | None, typer.Option(help="0.8: 80 % of what the fleet can serve.")] = None,
    speed: Annotated[float, typer.Option(help="So many times as fast; not with --load.")] = 1.0,
    mix: Annotated[str | None, typer.Option(metavar="MODEL=SHARE,…", help="Models; else the fleet's first.")] = None,
    contexts: Annotated[
        str | None, typer.Option(metavar="N=SHARE,…", help="Context lengths that are asked for.")
    ] = None,
    priorities: Annotated[str | None, typer.Option(metavar="CLASS=SHARE,…", help="Classes of requests.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="How many clients send; the first sends most.")] = 1,
    prompt_tokens: Annotated[float, typer.Option(min=1, help="Mean length of a prompt (not of a trace).")] = 400.0,
    tokens: Annotated[float, typer.Option(min=1, help="Mean length of an answer (not of a trace).")] = 200.0,
    fixed: Annotated[bool, typer.Option("--fixed", help="All prompts and answers have the mean length.")] = False,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each conversation (with --poisson).")] = 1,
    think_s: Annotated[
        float, typer.Option(min=0, help="Seconds between an answer and the next turn (with --turns).")
    ] = 5.0,
    systems: Annotated[
        int, typer.Option(min=0, help="How many system prompts conversations share (with --poisson).")
    ] = 0,
    system_tokens: Annotated[int, typer.Option(min=1, help="Length of a system prompt (with --systems).")] = 1000,
    sessions: Annotated[
        bool, typer.Option("--sessions", help="Clients name their conversations (with --turns).")
    ] = False,
    batch: Annotated[int, typer.Option(min=0, help="So many batch requests at the start, too.")] = 0,
    max_queue: Annotated[int, typer.Option(min=0, help="The gateway's queue.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of all that is random.")] = 1,
    out: OutOption = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a result that is there.")] = False,
    as_json: Annotated[bool, json_option("As JSON (schema gpumesh.simulation/1).")] = False,
) -> None:
    """Simulate a fleet: the balancer's own code against simulated servers, in simulated time.

    The policy `reference` is a yardstick: it knows the lengths of all answers and the caches of all servers. It knows
    no classes, clients or sessions: compare it with the others without --priorities and --batch.

    \b
    Examples:
      gpumesh bench simulate --fleet fleet.yaml --poisson 4 --load 0.8
      gpumesh bench simulate --fleet fleet.yaml --trace azure_conv_2023.csv --policy adaptive --policy reference
      gpumesh bench simulate --fleet fleet.yaml --poisson 4 --mix llama3.1:8b=0.7,qwen2.5:14b=0.3 --json
    """
    from gpumesh.balancer.base import Priority
    from gpumesh.bench.simulate.decisions import POLICY_NAMES
    from gpumesh.bench.simulate.report import simulation_json
    from gpumesh.bench.simulate.run import simulate_policies
    from gpumesh.bench.simulate.workloads import Workload
    from gpumesh.cli.bench import simulate_options
    from gpumesh.cli.views import bench_tables

    options = global_options(ctx)
    if (trace is None) == (poisson is None):  # both are given, or neither
        raise UsageError("give either --trace FILE or --poisson RATE")
    nodes = simulate_options.read_fleet(fleet)
    traced_requests = bench_options.read_trace(trace, requests)
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given_options = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    simulate_options.check_effect(given_options, has_trace=trace is not None, batch=batch)
    for name, number in (("--poisson", poisson), ("--load", load), ("--speed", speed)):
        if number is not None:
            simulate_options.check_positive(name, number)
    workload = Workload(
        models=simulate_options.models_mix(mix, nodes),
        count=requests or len(traced_requests) or 10_000,
        rate=poisson or 1.0,  # not used with a trace, which has its own times
        trace=traced_requests,
        time_factor=1.0 / speed,
        prompt_tokens=prompt_tokens,
        output_tokens=tokens,
        has_fixed_lengths=fixed,
        contexts=simulate_options.parse_mix(
            "--contexts", contexts or "default", simulate_options.parse_context, example="4096=0.7,default=0.3"
        ),
        priorities=simulate_options.parse_mix(
            "--priorities", priorities or "normal", Priority, example="interactive=0.2,normal=0.5,batch=0.3"
        ),
        clients=clients,
        turns=turns,
        think_s=think_s,
        system_prompts=systems,
        system_tokens=system_tokens,
        names_sessions=sessions,
        batch=batch,
        seed=seed,
    )
    source = f"trace {trace.name}" if trace is not None else "requests at random times"
    if out is not None:
        simulate_options.check_folder(out, force=force)
    result = simulate_policies(
        nodes,
        workload,
        policy or POLICY_NAMES,
        source=source,
        load=load,
        max_queue=max_queue,
    )
    if out is not None:
        simulate_options.write_result(out, result)
        if not options.quiet:
            typer.echo(f"result in {out} (report.html opens in a browser)", err=True)
    if as_json:
        print_json(simulation_json(result))
    else:
        bench_tables.print_simulation(result, notes=not options.quiet)
