"""`gpumesh models`: lists, pulls, removes, loads and syncs the fleet's models, through Ollama's API on each node."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.first_report import FIRST_REPORT_TIMEOUT_S
from gpumesh.cli.global_options import GlobalOptions, global_options
from gpumesh.cli.json_output import json_option
from gpumesh.cli.open_session import open_session, run_async, running_topology
from gpumesh.cli.output_format import OutputFormat, choose_format, output_option, print_document, print_names
from gpumesh.cli.views.figures import UNKNOWN, format_duration, format_gib
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import ExitCode, GPUMeshError, UsageError

if TYPE_CHECKING:
    from gpumesh.daemon.sessions.session import Session
    from gpumesh.mesh.models import inventory
    from gpumesh.mesh.models.url_stores import UrlStores
    from gpumesh.state import MeshState, NodeState

MAX_LISTED_NAMES = 6  # in one cell of the table; the cell only counts the others
# A year. For a model that stays loaded for ever (keep_alive -1) Ollama gives a time some centuries ahead.
FOREVER_S = 86400.0 * 365

NodesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--node", "-n", metavar="NODE", help="On this node; repeatable.", autocompletion=completion.complete_nodes
    ),
]
ModelsArgument = Annotated[list[str], typer.Argument(metavar="MODEL", autocompletion=completion.complete_models)]
AllOption = Annotated[bool, typer.Option("--all", "-a", help="On every node that is up.")]
JsonOption = Annotated[bool, json_option()]
FormatOption = Annotated[OutputFormat | None, output_option()]

app = new_app(invoke_without_command=True)


@app.callback()
def models(ctx: typer.Context, as_json: JsonOption = False, output: FormatOption = None) -> None:
    """The fleet's models: which node has which, and where it is in memory. Without a command: list.

    \b
    Examples:
      gpumesh models
      gpumesh models pull qwen2.5:7b --all
      gpumesh models load qwen2.5:7b --node iceland --keep-alive 2h
      gpumesh models sync --from iceland
    """
    if ctx.invoked_subcommand is None:
        run_async(_list_models(global_options(ctx), choose_format(output, as_json)))
    elif as_json or output is not None:
        raise UsageError(
            f"--json and -o belong behind the command: gpumesh models {ctx.invoked_subcommand} …",
            hint="only `gpumesh models list` knows them",
        )


# -- list ------------------------------------------------------------------------------------------------------------


@app.command("list")
def list_(ctx: typer.Context, as_json: JsonOption = False, output: FormatOption = None) -> None:
    """One table over all nodes that are up: what is installed where, and what is in memory for how long.

    CONTEXT is the longest that a model was made for. A name that stands twice is not the same model everywhere: the
    nodes have it with different digests, as after a pull at another time.
    """
    run_async(_list_models(global_options(ctx), choose_format(output, as_json)))


async def _list_models(options: GlobalOptions, chosen_format: str | None) -> None:
    """Prints the models of all nodes that are up to stdout, and remarks to stderr."""
    from gpumesh.mesh.models import inventory
    from gpumesh.wire import to_json

    async with _open_stores(options) as (session, stores):
        first_report = await session.wait_first_report(FIRST_REPORT_TIMEOUT_S)
        state = await stores.refresh_backends(first_report)
        rows = inventory.list_model_rows(state)
        lengths = await stores.context_lengths(_models_to_ask(state, rows))
    rows = inventory.add_context_lengths(rows, lengths)
    if chosen_format == OutputFormat.NAME:
        print_names(dict.fromkeys(row.name for row in rows))
    elif chosen_format in (None, OutputFormat.WIDE):
        _print_table(rows, wide=chosen_format == OutputFormat.WIDE)
    else:
        print_document({"schema": "gpumesh.models/1", "models": to_json(rows)}, chosen_format)
    if not options.quiet:
        _print_remarks(state, rows)


@asynccontextmanager
async def _open_stores(options: GlobalOptions) -> AsyncGenerator[tuple[Session, UrlStores]]:
    """Opens a Session, and the model stores of the nodes that its mesh has."""
    from gpumesh.mesh.models.url_stores import open_url_stores

    async with open_session(options) as session:
        topology = await running_topology(session, options)
        async with open_url_stores(topology) as stores:
            yield session, stores


def _models_to_ask(state: MeshState, rows: Sequence[inventory.ModelRow]) -> list[tuple[NodeState, str]]:
    """Pairs of node and model, for the question about the context length. A digest has the same context length
    everywhere, so for each row only its first node with a model store is asked. Leaves out rows without such a
    node."""
    from gpumesh.mesh.models import inventory

    store_nodes = {node.name: node for node in inventory.list_store_nodes(state)}
    pairs = []
    for row in rows:
        first_node = next((store_nodes[name] for name in row.nodes if name in store_nodes), None)
        if first_node is not None:
            pairs.append((first_node, row.name))
    return pairs


def _print_remarks(state: MeshState, rows: Sequence[inventory.ModelRow]) -> None:
    """Prints to stderr which models differ between nodes, and which nodes are missing from the list."""
    from gpumesh.mesh.models import inventory

    for name in sorted({row.name for row in rows if row.differs_between_nodes}):
        typer.echo(clean_line(f"{name} is not the same on all nodes: `gpumesh models sync` makes it so"), err=True)
    up_nodes = inventory.list_up_nodes(state)
    for node in state.nodes:
        if node not in up_nodes:
            typer.echo(clean_line(f"{node.name} is not counted: {node.reason or 'no answer yet'}"), err=True)


def _print_table(rows: Sequence[inventory.ModelRow], *, wide: bool = False) -> None:
    """Prints the models to stdout. A digest is yellow if nodes have other digests under the same name. ``wide``: with
    all columns, and with the names of all nodes."""
    from gpumesh.cli.views import tables
    from gpumesh.mesh.models import inventory

    cells = []
    for row in rows:
        size = UNKNOWN if row.size_mib is None else format_gib(row.size_mib)
        kind = " ".join(filter(None, (row.parameters, row.quantization))) or UNKNOWN
        context = UNKNOWN if row.context_length is None else str(row.context_length)
        digest = tables.Cell(
            inventory.shorten_digest(row.digest) or UNKNOWN, "yellow" if row.differs_between_nodes else "dim"
        )
        max_names = sys.maxsize if wide else MAX_LISTED_NAMES
        node_names = _join_names(row.nodes, max_names)
        loaded = _join_names([_format_loaded(copy) for copy in row.loaded], max_names) or UNKNOWN
        cells.append((row.name, size, kind, context, digest, node_names, loaded))
    columns = (  # the second argument is the rank: columns with a low rank get their place first
        tables.Column("MODEL"),
        tables.Column("GiB", 3, right=True),
        tables.Column("KIND", 4),
        tables.Column("CONTEXT", 6, right=True),
        tables.Column("ID", 5),
        tables.Column("NODES", 1, min_width=12),
        tables.Column("IN MEMORY", 2, min_width=20),
    )
    tables.print_fitted_table(columns, cells, wide=wide)


def _join_names(names: Sequence[str], limit: int) -> str:
    """The first ``limit`` names, and how many others there are: ``a, b +3``."""
    hidden_count = len(names) - limit
    return ", ".join(names[:limit]) + (f" +{hidden_count}" if hidden_count > 0 else "")


def _format_loaded(copy: inventory.LoadedCopy) -> str:
    """The node, and how long the model stays in its memory if that is known: ``iceland 4m``."""
    if copy.left_s is None:
        return copy.node
    time_left = "∞" if copy.left_s > FOREVER_S else format_duration(copy.left_s)
    return f"{copy.node} {time_left}"


# -- operations ------------------------------------------------------------------------------------------------------


@app.command()
def pull(ctx: typer.Context, models: ModelsArgument, node: NodesOption = None, everywhere: AllOption = False) -> None:
    """Fetch models from Ollama's library to nodes (--node, or --all), each straight from the library.

    Ctrl-C stops the downloads; the next pull goes on from there.
    """
    from gpumesh.mesh.models import inventory

    def plan(state: MeshState) -> list[inventory.ModelTask]:
        nodes = inventory.choose_nodes(state, node or (), everywhere=everywhere, required_model=None)
        return [inventory.ModelTask(target, model) for model in models for target in nodes]

    run_async(_pull_models(global_options(ctx), plan))


@app.command()
def sync(
    ctx: typer.Context,
    from_: Annotated[
        str,
        typer.Option(
            "--from", metavar="NODE", help="The node that has it right.", autocompletion=completion.complete_nodes
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Only these models.", autocompletion=completion.complete_models),
    ] = None,
    node: NodesOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be pulled where.")] = False,
) -> None:
    """Give other nodes the models of one node: what they lack or have with another digest is pulled.

    All nodes that are up, or those named by --node. Nothing is removed. Models that were made on the node itself are
    in no library, and cannot be pulled.
    """
    from gpumesh.mesh.models import inventory

    options = global_options(ctx)

    def plan(state: MeshState) -> list[inventory.ModelTask]:
        return inventory.plan_sync(state, from_, node or (), models or ())

    def plan_and_print(state: MeshState) -> list[inventory.ModelTask]:
        """Returns the pulls to perform. With ``--dry-run`` prints them instead, and returns none."""
        tasks = plan(state)
        if not tasks and not options.quiet:
            typer.echo(f"nothing to do: the others have all that {from_} has", err=True)
        if not dry_run:
            return tasks
        for task in tasks:
            typer.echo(clean_line(f"{task.node.name}: {task.model} would be pulled"))
        return []

    for task in run_async(_pull_models(options, plan_and_print, plan_again=plan)):
        message = f"{task.node.name}: {task.model} is still another than on {from_}: the library has a newer one"
        typer.echo(clean_line(f"{message}; pull it on {from_} as well"), err=True)


@app.command()
def rm(ctx: typer.Context, models: ModelsArgument, node: NodesOption = None, everywhere: AllOption = False) -> None:
    """Delete models from nodes' disks (--node, or --all that have it)."""
    run_async(_run_operation(global_options(ctx), node, everywhere, "rm", models, "removed"))


@app.command()
def load(
    ctx: typer.Context,
    models: ModelsArgument,
    node: NodesOption = None,
    everywhere: AllOption = False,
    keep_alive: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="How long it stays without use: 30m, 24h, -1 for ever; else 5m."),
    ] = None,
) -> None:
    """Load models into GPU memory, so that the first prompt need not wait for it."""
    run_async(_run_operation(global_options(ctx), node, everywhere, "load", models, "loaded", keep_alive=keep_alive))


@app.command()
def unload(ctx: typer.Context, models: ModelsArgument, node: NodesOption = None, everywhere: AllOption = False) -> None:
    """Free the GPU memory that models take."""
    run_async(_run_operation(global_options(ctx), node, everywhere, "unload", models, "unloaded"))


async def _run_operation(
    options: GlobalOptions,
    names: Sequence[str] | None,
    everywhere: bool,
    operation: str,
    models: Sequence[str],
    verb: str,
    *,
    keep_alive: str | None = None,
) -> None:
    """Performs ``operation`` (rm, load, unload) on the nodes ``names``, or without names on every node that has the
    model. Raises UsageError if several nodes have it and neither ``names`` nor ``everywhere`` is given.

    ``verb``: the operation in the lines with the results, as ``removed``. Exits with FAILED if a task failed."""
    from gpumesh.mesh.models import inventory

    async with _open_stores(options) as (session, stores):
        first_report = await session.wait_first_report(FIRST_REPORT_TIMEOUT_S)
        state = await stores.refresh_backends(first_report)
        tasks = [
            inventory.ModelTask(node, model)
            for model in models
            for node in inventory.choose_nodes(state, names or (), everywhere=everywhere, required_model=model)
        ]

        async def perform(task: inventory.ModelTask) -> None:
            """Does one task in the model store of its node."""
            store = stores.of(task.node)
            embedder = inventory.is_embedder_on(task.node, task.model)
            match operation:
                case "rm":
                    await store.remove(task.model)
                case "load":
                    await store.load(task.model, embedder=embedder, keep_alive=keep_alive)
                case _:  # unload
                    await store.unload(task.model, embedder=embedder)

        await _perform_and_report(tasks, perform, verb)


TaskPlanner = Callable[["MeshState"], list["inventory.ModelTask"]]
"""Chooses the pulls for a state of the mesh."""


async def _pull_models(
    options: GlobalOptions, plan: TaskPlanner, plan_again: TaskPlanner | None = None
) -> list[inventory.ModelTask]:
    """Performs the pulls that ``plan`` returns for the state of the nodes. Returns the pulls that had no effect: those
    that ``plan_again`` still returns for the state afterwards. Without ``plan_again``, returns an empty list."""
    from gpumesh.cli.views.download_bars import show_downloads

    async with _open_stores(options) as (session, stores):
        first_report = await session.wait_first_report(FIRST_REPORT_TIMEOUT_S)
        tasks = plan(await stores.refresh_backends(first_report))
        several_models = len({task.model for task in tasks}) > 1
        with show_downloads(quiet=options.quiet) as display:

            async def perform(task: inventory.ModelTask) -> None:
                name = f"{task.node.name} {task.model}" if several_models else task.node.name
                async with aclosing(stores.of(task.node).pull(task.model)) as steps:
                    async for step in steps:
                        display(name, step)

            await _perform_and_report(tasks, perform, "pulled", write=display.write)
        if plan_again is None or not tasks:
            return []
        remaining_tasks = plan_again(await stores.refresh_backends(await session.status()))
    planned_pulls = {(task.node.name, task.model) for task in tasks}
    return [task for task in remaining_tasks if (task.node.name, task.model) in planned_pulls]


async def _perform_and_report(
    tasks: Sequence[inventory.ModelTask],
    perform: Callable[[inventory.ModelTask], Awaitable[None]],
    verb: str,
    *,
    write: Callable[[str], None] = typer.echo,
) -> None:
    """Performs the tasks. Writes a line to stdout for each task that succeeded, a line to stderr for each that failed,
    then the hints of the errors. Exits with FAILED if a task failed."""
    from gpumesh.mesh.models.url_stores import TaskResult, perform_tasks

    errors: list[GPUMeshError] = []

    def report(result: TaskResult) -> None:
        """Prints what has become of one task."""
        node, model = result.task.node.name, result.task.model
        if result.error is None:
            write(clean_line(f"{node}: {model} {verb}"))
        else:
            errors.append(result.error)
            typer.echo(clean_line(f"{node}: {model}: {result.error.message}"), err=True)

    await perform_tasks(tasks, perform, report)
    for hint in dict.fromkeys(error.hint for error in errors if error.hint):  # equal hints once
        typer.echo(clean_line(f"hint: {hint}"), err=True)
    if errors:
        raise typer.Exit(int(ExitCode.FAILED))
