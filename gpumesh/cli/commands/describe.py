"""`gpumesh describe NODE`: all that is known of a node, of a running mesh or by looking at it once."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.first_report import FIRST_REPORT_TIMEOUT_S
from gpumesh.cli.global_options import GlobalOptions, find_node, global_options
from gpumesh.cli.json_output import json_option
from gpumesh.cli.open_session import open_local_session, open_session, run_async, running_topology
from gpumesh.cli.output_format import DocumentFormat, choose_format, output_option, print_document
from gpumesh.cli.views.node_selection import select_nodes
from gpumesh.errors import MeshNotRunning
from gpumesh.state import MeshState

if TYPE_CHECKING:
    from gpumesh.daemon.sessions.session import Session
    from gpumesh.topology import NodeSpec, Topology

app = new_app()


@app.command()
def describe(
    ctx: typer.Context,
    nodes: Annotated[list[str], typer.Argument(metavar="NODE...", autocompletion=completion.complete_nodes)],
    as_json: Annotated[bool, json_option("As JSON (schema gpumesh.describe/1).")] = False,
    output: Annotated[DocumentFormat | None, output_option(DocumentFormat)] = None,
) -> None:
    """All that is known of a node: tunnel, host, GPUs with their processes, server, models, load, findings, settings.

    Asks the running mesh, or looks at these nodes once if none is running. The settings are those of mesh.yaml with
    every default; secrets are only named.

    \b
    Examples:
      gpumesh describe iceland
      gpumesh describe iceland -o yaml
    """
    options = global_options(ctx)
    chosen_format = choose_format(output, as_json)
    names = list(dict.fromkeys(nodes))
    state, topology = run_async(_read_state(options, names))
    specs = {spec.name: spec for spec in topology.nodes}
    states = [(select_nodes(state, [name]), specs.get(name)) for name in names]
    if chosen_format is not None:
        documents = [_document(node_state, spec) for node_state, spec in states]
        print_document({"schema": "gpumesh.describe/1", "nodes": documents}, chosen_format)
        return
    from gpumesh.cli.views.description.description import print_description
    from gpumesh.config.show import dump_node

    for position, (node_state, spec) in enumerate(states):
        if position:
            typer.echo("")
        print_description(node_state, None if spec is None else dump_node(spec))


async def _read_state(options: GlobalOptions, names: list[str]) -> tuple[MeshState, Topology]:
    """The state of the mesh, and what it has read from mesh.yaml. Raises UsageError for an unknown name."""
    async with _open_session(options, names) as session:
        state = await session.wait_first_report(FIRST_REPORT_TIMEOUT_S)
        return state, await running_topology(session, options)


@asynccontextmanager
async def _open_session(options: GlobalOptions, names: list[str]) -> AsyncGenerator[Session]:
    """A Session on the running mesh; if none runs, on a mesh of these nodes alone, so that no other is waited for."""
    async with AsyncExitStack() as stack:
        session: Session
        try:
            session = await stack.enter_async_context(open_session(options, embed=False))
        except MeshNotRunning:
            topology = options.topology()
            specs = tuple(find_node(topology, name) for name in names)
            lone_nodes = replace(topology, nodes=specs, models=())
            session = await stack.enter_async_context(open_local_session(options, lone_nodes))
        yield session


def _document(state: MeshState, spec: NodeSpec | None) -> dict[str, Any]:
    """The document about one node: its part of gpumesh.status/1, its findings and its settings."""
    from gpumesh.config.show import node_settings
    from gpumesh.wire import to_json

    (node,) = state.nodes
    return {
        "node": to_json(node),
        "findings": to_json(state.findings),
        "settings": None if spec is None else node_settings(spec),
    }
