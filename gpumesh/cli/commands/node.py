"""`gpumesh node`: adds, removes and changes nodes in mesh.yaml, and lets the running mesh read it.

Further parts of the command are in `cli/node/`.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import global_options
from gpumesh.cli.json_output import json_option
from gpumesh.cli.output_format import OutputFormat, choose_format, output_option, print_document, print_names
from gpumesh.cli.views.safe_text import clean_line, clean_text
from gpumesh.errors import UsageError

NodesArgument = Annotated[list[str], typer.Argument(metavar="NODE...", autocompletion=completion.complete_nodes)]

app = new_app(no_args_is_help=True)


@app.callback()
def node() -> None:
    """Add, remove and change nodes while the mesh runs. mesh.yaml is written, and its comments stay.

    \b
    Examples:
      gpumesh node add 'ssh root@203.0.113.7 -p 17445'
      gpumesh node edit iceland weight=2 ssh.port=17446
      gpumesh node rm iceland
    """


# -- add -------------------------------------------------------------------------------------------------------------


# ``ignore_unknown_options``: a person may paste an ssh command line without quotes around it.
@app.command(context_settings={"ignore_unknown_options": True})
def add(
    ctx: typer.Context,
    hosts: Annotated[
        list[str], typer.Argument(metavar="'ssh …'...", help="ssh command lines, aliases, or - for stdin.")
    ],
    name: Annotated[str | None, typer.Option("--name", "-n", metavar="NAME", help="The node's name.")] = None,
    identity: Annotated[
        str | None, typer.Option("--identity", "-i", metavar="FILE", help="The key, if the line names none.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also add a host that cannot be reached now.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing, and trust a host key that is new.")] = False,
) -> None:
    """Add hosts to mesh.yaml, after a look at their servers and GPUs, and to the mesh that runs.

    A host that cannot be reached is not added without --force. A host without a server that answers is added, and the
    exit code is 3. Without a mesh.yaml, one is written as `gpumesh init` writes it.

    \b
    Examples:
      gpumesh node add 'ssh root@203.0.113.7 -p 17445 -i ~/.ssh/id_ed25519' --name pod
      gpumesh node add workstation          a Host of ~/.ssh/config
      vastai show instances --raw | gpumesh node add - --yes
    """
    from gpumesh.cli.init.host_input import mark_aliases, read_hosts
    from gpumesh.cli.init.node_drafts import make_host_drafts
    from gpumesh.cli.node.added_hosts import add_hosts, join_words

    options = global_options(ctx)
    lines, pods = read_hosts(join_words(hosts))
    for pod in pods:
        if pod.unreachable_reason is not None:
            typer.echo(clean_line(f"{pod.name} is left out: {pod.unreachable_reason}"), err=True)
    drafts = make_host_drafts(mark_aliases(lines), (), pods, identity=identity)
    if not drafts:
        raise UsageError("no host was named", hint="gpumesh node add 'ssh root@HOST -p PORT'")
    add_hosts(options, drafts, name=name, force=force, yes=yes)


# -- rm --------------------------------------------------------------------------------------------------------------


@app.command()
def rm(ctx: typer.Context, nodes: NodesArgument) -> None:
    """Remove nodes from mesh.yaml, and from the mesh that runs: it gives them no new work, and lets theirs end.

    What stood in mesh.yaml is shown, so that it can be put back.
    """
    from gpumesh.cli.node.mesh_change import apply_change, change_file, forget_host_keys
    from gpumesh.config.editing import node_changes

    options = global_options(ctx)
    path = options.config_file()
    old = options.topology()
    changed = change_file(path, lambda text: node_changes.remove_nodes(path, text, nodes))
    forget_host_keys(old, nodes)
    if not options.quiet:
        typer.echo("this stood in mesh.yaml; put it back under `nodes:` to undo:", err=True)
        typer.echo(clean_text("\n".join(changed.removed)), err=True)
    for name in dict.fromkeys(nodes):
        typer.echo(clean_line(f"removed {name}"))
    apply_change(options, changed.topology)


# -- edit ------------------------------------------------------------------------------------------------------------


@app.command()
def edit(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NODE", autocompletion=completion.complete_nodes)],
    values: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...")] = None,
) -> None:
    """Change a node in mesh.yaml, and in the mesh that runs. Without KEY=VALUE, $EDITOR opens the node's part.

    \b
    Examples:
      gpumesh node edit pod ssh.port=17446          it has another port after a restart
      gpumesh node edit pod weight=2 enabled=false
      gpumesh node edit pod 'expect.models=[qwen2.5:7b, llama3.2:1b]'
    """
    from gpumesh.cli.node.edited_node import edit_node, set_node_values
    from gpumesh.cli.node.editor import EditCancelled
    from gpumesh.cli.node.mesh_change import apply_change
    from gpumesh.config.editing import edit as file_edit

    options = global_options(ctx)
    path = options.config_file()
    text = file_edit.read(path)
    try:
        changed = set_node_values(path, name, values) if values else edit_node(path, text, name)
    except EditCancelled as cancelled:
        typer.echo(cancelled.message, err=True)
        return
    if changed.text == text:
        typer.echo(clean_line(f"{name} is so already"))
        return
    typer.echo(clean_line(f"changed {changed.name}"))
    if changed.topology != file_edit.parse_edited(path, text):  # otherwise only a comment was changed
        apply_change(options, changed.topology)


# -- list ------------------------------------------------------------------------------------------------------------


@app.command("list")
def list_(
    ctx: typer.Context,
    as_json: Annotated[bool, json_option()] = False,
    output: Annotated[OutputFormat | None, output_option()] = None,
) -> None:
    """The nodes of mesh.yaml: how they are reached, and what the running mesh says of them. Probes nothing."""
    from gpumesh.cli.node.node_table import list_nodes, print_nodes
    from gpumesh.cli.open_session import run_async
    from gpumesh.config.editing import edit as file_edit

    chosen_format = choose_format(output, as_json)
    options = global_options(ctx)
    path = options.config_file()
    rows: list[Any] = run_async(list_nodes(options, file_edit.parse_edited(path, file_edit.read(path))))
    if chosen_format == OutputFormat.NAME:
        print_names(row["name"] for row in rows)
    elif chosen_format in (None, OutputFormat.WIDE):
        print_nodes(rows, wide=chosen_format == OutputFormat.WIDE)
    else:
        print_document({"schema": "gpumesh.nodes/1", "file": str(path), "nodes": rows}, chosen_format)
