"""`gpumesh pool`: one model over the GPUs of several nodes: plans, starts, stops and shows pools."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import GlobalOptions, global_options
from gpumesh.cli.json_output import json_option
from gpumesh.cli.open_session import open_session, run_async, running_topology
from gpumesh.cli.output_format import (
    DocumentFormat,
    OutputFormat,
    choose_format,
    output_option,
    print_document,
    print_names,
)
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import MeshNotRunning, PoolDoesNotFit, UsageError
from gpumesh.pool_spec import KvType
from gpumesh.text.quoting import paste_command
from gpumesh.text.sentences import join_all

if TYPE_CHECKING:
    from gpumesh.daemon.sessions.session import Session
    from gpumesh.pool_spec import PoolSpec
    from gpumesh.pools.base import PoolPlan, PoolState

SCHEMA = "gpumesh.pool/1"

PoolArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME", help="The pool; the only one if not given.", autocompletion=completion.complete_pools
    ),
]
JsonOption = Annotated[bool, json_option("As JSON: gpumesh.pool/1.")]
DocumentOption = Annotated[DocumentFormat | None, output_option(DocumentFormat)]
FormatOption = Annotated[OutputFormat | None, output_option()]

app = new_app(invoke_without_command=True)


@app.callback()
def pool(ctx: typer.Context, as_json: JsonOption = False, output: FormatOption = None) -> None:
    """One model over the GPUs of several nodes, because it is too big for any of them. Without a command: status.

    \b
    Examples:
      gpumesh pool plan llama3.3:70b --context 16384
      gpumesh pool up big && gpumesh run -m llama3.3:70b 'hello'
      gpumesh pool status
    """
    if ctx.invoked_subcommand is None:
        _show_states(global_options(ctx), None, choose_format(output, as_json))
    elif as_json or output is not None:
        raise UsageError(
            f"--json and -o belong behind the command: gpumesh pool {ctx.invoked_subcommand} …",
            hint=paste_command("gpumesh pool {COMMAND} --json", COMMAND=ctx.invoked_subcommand),
        )


# -- plan ------------------------------------------------------------------------------------------------------------


@app.command("plan")
def plan_(
    ctx: typer.Context,
    wanted: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|POOL",
            help="A pool of mesh.yaml; a model that a node's Ollama has; or a GGUF file's path on the head's host.",
            autocompletion=completion.complete_pools_and_models,
        ),
    ] = None,
    nodes: Annotated[
        list[str] | None,
        typer.Option(
            "--nodes",
            "--node",
            "-n",
            metavar="NODE,...",
            help="Over these nodes; a=20GiB takes at most that much there. All with a host if not given.",
            autocompletion=completion.complete_nodes,
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="NODE", help="Runs llama-server and has the file.", autocompletion=completion.complete_nodes
        ),
    ] = None,
    context: Annotated[int | None, typer.Option(metavar="TOKENS", min=128, help="Of each stream.")] = None,
    parallel: Annotated[int | None, typer.Option(metavar="N", min=1, max=256, help="Streams at once.")] = None,
    kv_type: Annotated[KvType | None, typer.Option("--kv-type", help="Of the numbers in the KV cache.")] = None,
    draft: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A small model on the head that proposes tokens, or `ngram`.")
    ] = None,
    llama_cpp_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="With llama.cpp's programs on the hosts; else looked for.")
    ] = None,
    as_json: JsonOption = False,
    output: DocumentOption = None,
) -> None:
    """Show how a model would be divided over nodes: layers, memory, time to load, tokens/s. Starts nothing.

    Works with and without a running mesh. A plan that does not fit says by how much, and what would; the exit code
    is 1 then.

    \b
    Examples:
      gpumesh pool plan big
      gpumesh pool plan llama3.3:70b --nodes vengeance,iceland=20GiB --context 16384 --parallel 4
      gpumesh pool plan ~/models/llama-70b-q4_k_m.gguf --head vengeance --kv-type q8_0
    """
    from gpumesh.cli.pool.made_plan import make_plan
    from gpumesh.cli.pool.pool_choice import PlanRequest, parse_members

    options = global_options(ctx)
    chosen_format = choose_format(output, as_json)
    members = parse_members(nodes) if nodes else None
    request = PlanRequest(wanted, members, head, context, parallel, kv_type, draft, llama_cpp_dir)
    made = run_async(make_plan(options, request))
    plan = made.plan
    if chosen_format is not None:
        print_document({"schema": SCHEMA, "fits": plan.fits, **_document(plan)}, chosen_format)
    else:
        from gpumesh.cli.views.pool.plan_view import print_plan

        print_plan(plan)
    if not options.quiet:
        for remark in made.remarks():
            typer.echo(clean_line(remark), err=True)
    if not plan.fits:
        is_shown = chosen_format is None  # the advice stands right above
        hint = None if is_shown or not plan.advice else plan.advice[0]
        raise PoolDoesNotFit(f"{plan.pool} does not fit: {plan.problems[0]}", hint=hint)
    if chosen_format is None and not options.quiet:
        lines = [clean_line(line) for line in made.how_to_start()]
        if lines:
            typer.echo("\n" + "\n".join(lines), err=True)


# -- up --------------------------------------------------------------------------------------------------------------


@app.command()
def up(ctx: typer.Context, name: PoolArgument = None, as_json: JsonOption = False) -> None:
    """Start a pool of the running mesh, and wait until it answers. Ctrl-C before that stops it.

    llama.cpp is started on its hosts, and the model is loaded; the mesh watches over it until `gpumesh pool down`.

    \b
    Example:
      gpumesh up -d && gpumesh pool up big
    """
    options = global_options(ctx)
    state, was_ready = run_async(_start_pool(options, name))
    if as_json:
        _print_states([state])
    elif was_ready:
        from gpumesh.cli.views.pool.state_view import format_age

        age = "" if state.since is None else f", for {format_age(state.since, datetime.now(UTC))}"
        typer.echo(clean_line(f"{state.pool} is ready already{age}"))
    else:
        nodes = join_all([member.node for member in state.members if member.is_head or member.layers])
        typer.echo(clean_line(f"{state.pool} is ready: {state.model}{' on ' if nodes else ''}{nodes}"))
        if not options.quiet:
            typer.echo(paste_command("gpumesh run -m {MODEL} hello", MODEL=state.model) + " asks it", err=True)


async def _start_pool(options: GlobalOptions, name: str | None) -> tuple[PoolState, bool]:
    """The state of the pool when it is ready, and whether it was ready before."""
    from gpumesh.cli.views.pool.start_progress import show_start
    from gpumesh.event_loop.async_iterators import closing_iterator
    from gpumesh.pools.base import PoolPhase

    async with _open_pools(options, name) as (session, state):
        if state.phase is PoolPhase.READY and state.reason is None:  # else mesh.yaml has changed the pool
            return state, True
        latest, was_stopped = state, state.phase in (PoolPhase.STOPPED, PoolPhase.FAILED)
        try:
            with show_start(quiet=options.quiet) as display:
                async with closing_iterator(session.start_pool(state.pool)) as states:
                    async for latest in states:
                        display(latest)
        except asyncio.CancelledError:
            if not options.quiet:
                end = "is being stopped" if was_stopped else "starts on, because it was started before"
                typer.echo(
                    f"{state.pool} {end}: {paste_command('gpumesh pool status {POOL}', POOL=state.pool)}", err=True
                )
            raise
        return latest, False


@asynccontextmanager
async def _open_pools(options: GlobalOptions, name: str | None) -> AsyncGenerator[tuple[Session, PoolState]]:
    """A Session on the running mesh, and the state of the pool that is called ``name`` or is the only one. Raises
    UsageError if the mesh has no such pool."""
    from gpumesh.cli.pool.pool_choice import choose_pool

    # embed=False: without a running mesh this is an error, for the pool would end with the command.
    async with open_session(options, embed=False) as session:
        topology = await running_topology(session, options)
        try:
            chosen = choose_pool(topology.pools, name)
        except UsageError as error:
            if name is not None and name in [pool.name for pool in options.topology().pools]:
                raise UsageError(
                    f"the running mesh does not know the pool {name} yet: it is new in mesh.yaml",
                    hint="`gpumesh reload` lets it take the file over",
                ) from error
            raise
        states = [state for state in await session.pools() if state.pool == chosen.name]
        yield session, states[0] if states else _stopped_state(chosen)


def _stopped_state(spec: PoolSpec) -> PoolState:
    from gpumesh.pools.base import PoolPhase, PoolState

    return PoolState(spec.name, spec.served_name, PoolPhase.STOPPED)


# -- down ------------------------------------------------------------------------------------------------------------


@app.command()
def down(ctx: typer.Context, name: PoolArgument = None, as_json: JsonOption = False) -> None:
    """Stop a pool: its programs end on all its hosts, and their memory is free again.

    A pool that does not run is stopped already: the exit code is 0.

    \b
    Example:
      gpumesh pool down big
    """
    options = global_options(ctx)
    try:
        state, was_stopped = run_async(_stop_pool(options, name))
    except MeshNotRunning as error:  # what was asked for is so already
        from gpumesh.cli.pool.pool_choice import choose_pool

        state, was_stopped = _stopped_state(choose_pool(options.topology().pools, name)), True
        if not options.quiet:
            typer.echo(error.message, err=True)
    if as_json:
        _print_states([state])
    else:
        typer.echo(clean_line(f"{state.pool} {'does not run' if was_stopped else 'is stopped'}"))


async def _stop_pool(options: GlobalOptions, name: str | None) -> tuple[PoolState, bool]:
    """The state of the pool when it is stopped, and whether it was stopped before."""
    from gpumesh.cli.views.pool.start_progress import show_waiting
    from gpumesh.pools.base import PoolPhase

    async with _open_pools(options, name) as (session, state):
        if state.phase is PoolPhase.STOPPED:
            return state, True
        with show_waiting(f"{state.pool} stops its programs", quiet=options.quiet):
            await session.stop_pool(state.pool)
        return next((left for left in await session.pools() if left.pool == state.pool), state), False


# -- status ----------------------------------------------------------------------------------------------------------


@app.command()
def status(
    ctx: typer.Context, name: PoolArgument = None, as_json: JsonOption = False, output: FormatOption = None
) -> None:
    """What the pools of mesh.yaml do; of one pool also its nodes, planned and measured memory, and rates.

    \b
    Examples:
      gpumesh pool status
      gpumesh pool status big --json
    """
    _show_states(global_options(ctx), name, choose_format(output, as_json))


def _show_states(options: GlobalOptions, name: str | None, chosen_format: str | None) -> None:
    """Prints all pools, or the one that is called ``name``."""
    states = run_async(_read_states(options))
    if name is not None:
        from gpumesh.errors import unknown_pool

        names = [state.pool for state in states]
        if name not in names:
            raise unknown_pool(name, names)
        states = [state for state in states if state.pool == name]
    if chosen_format == OutputFormat.NAME:
        print_names(state.pool for state in states)
    elif chosen_format not in (None, OutputFormat.WIDE):
        _print_states(states, chosen_format)
    elif not states:
        typer.echo("mesh.yaml has no pools; `gpumesh pool plan MODEL` shows one, and what to write there")
    else:
        from gpumesh.cli.views.pool.state_view import print_pool, print_pools

        now = datetime.now(UTC)
        if name is not None or (len(states) == 1 and chosen_format is None):
            print_pool(states[0], now)
        else:
            print_pools(states, now, wide=chosen_format == OutputFormat.WIDE)


async def _read_states(options: GlobalOptions) -> Sequence[PoolState]:
    """The states of all pools of the running mesh; of those of mesh.yaml, all of which are stopped, if none runs."""
    try:
        async with open_session(options, embed=False) as session:
            return await session.pools()
    except MeshNotRunning:
        return [_stopped_state(spec) for spec in options.topology().pools]


# -- output ----------------------------------------------------------------------------------------------------------


def _print_states(states: Sequence[PoolState], output: str = OutputFormat.JSON) -> None:
    print_document({"schema": SCHEMA, "pools": [_document(state) for state in states]}, output)


def _document(value: PoolPlan | PoolState) -> dict[str, Any]:
    """A plan or a state for programs. The pool's name is its ``name``, as that of a node is."""
    from gpumesh.wire import to_json

    entries: dict[str, Any] = to_json(value)
    return {"name": entries.pop("pool"), **entries}
