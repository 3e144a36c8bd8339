"""`gpumesh audit`: compares what mesh.yaml expects with what is found; with --write, corrects mesh.yaml."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import GlobalOptions, global_options
from gpumesh.cli.json_output import json_option
from gpumesh.cli.open_session import open_local_session, open_session, run_async
from gpumesh.cli.output_format import DocumentFormat, choose_format, output_option, print_document
from gpumesh.cli.views.safe_text import clean_line, clean_text
from gpumesh.errors import ExitCode, GPUMeshError, UsageError
from gpumesh.state import Finding, MeshState, Severity
from gpumesh.topology import Topology

if TYPE_CHECKING:
    from gpumesh.audit.changes import Change
    from gpumesh.daemon.sessions.session import Session

app = new_app()


@app.command()
def audit(
    ctx: typer.Context,
    as_json: Annotated[bool, json_option()] = False,
    output: Annotated[DocumentFormat | None, output_option(DocumentFormat)] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Propose the corrected mesh.yaml as a diff, and write it if you agree.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --write: write without asking.")] = False,
) -> None:
    """What mesh.yaml expects against what is found, and why they differ.

    Asks every way to every server by itself, and settles whether two nodes are two machines or two ways to one: by
    their GPUs' UUIDs, else by the SSH host key or the model store. Exit code 3 when there is any finding that is more
    than a remark; with --write, when one is left that mesh.yaml is not to blame for.

    \b
    Examples:
      gpumesh audit
      gpumesh audit --write          shows a diff, and asks
      gpumesh explain same-gpu       what a verdict means
    """
    from gpumesh.cli.views import audit_rows, audit_screen
    from gpumesh.config.editing import edit

    if yes and not write:
        raise UsageError("--yes belongs to --write")
    chosen_format = choose_format(output, as_json)
    options = global_options(ctx)
    path = options.config_file()
    text = edit.read(path)
    topology = edit.parse_edited(path, text)
    state, is_running_mesh = run_async(_inspect(options, topology))
    correction = propose_correction(path, text, topology, state) if write else None
    findings: Sequence[Finding] = state.findings  # for the exit code: of the mesh.yaml that is there at the end
    if chosen_format is not None:
        # With --json nobody is asked, so the correction is only written with --yes.
        written = correction is not None and yes and correction.write()
        print_document(audit_document(topology, state, correction, written=written), chosen_format)
        if correction is not None and written:
            findings = correction.remaining_findings
    else:
        audit_screen.print_comparison(list(audit_rows.compare_nodes(topology, state.nodes, state.findings)))
        typer.echo("")
        audit_screen.print_drawing(audit_rows.draw_topology(topology, state.nodes))
        if not state.findings:
            typer.echo("\nall is as mesh.yaml says")
        if correction is not None:
            findings = _offer_correction(correction, yes=yes, is_running_mesh=is_running_mesh, quiet=options.quiet)
    if any(finding.severity is not Severity.INFO for finding in findings):
        raise typer.Exit(int(ExitCode.DEGRADED))


async def _inspect(options: GlobalOptions, topology: Topology) -> tuple[MeshState, bool]:
    """Inspects all nodes of the topology. Returns the state, then whether a mesh runs in the background.

    Asks a running mesh, unless ``topology`` leads to other hosts or servers than the mesh has reached. Then the running
    mesh knows nothing about these, and a mesh in this process inspects them. A finding names the differences between
    ``topology`` and the running mesh."""
    from gpumesh.cli.views.changed_file import replace_finding
    from gpumesh.config.changed_file import describe_change
    from gpumesh.config.comparison import compare_topologies
    from gpumesh.daemon.control_socket.remote_session import RemoteSession

    async with open_session(options, announce_change=False) as session:
        if not isinstance(session, RemoteSession):
            return await _inspect_session(session, topology), False
        snapshot = await session.configuration()
        # A mesh of an older version does not report what it has read.
        differences = None if snapshot is None else compare_topologies(snapshot.topology, topology)
        if snapshot is not None and differences is not None and not differences.change_routes:
            state = await _inspect_session(session, topology)
            # If only the expectations differ, there is no finding: the audit uses the expectations of ``topology``.
            is_remark = differences.change_expectations_only
            return replace_finding(state, None if is_remark else describe_change(snapshot.topology, topology)), True
    async with open_local_session(options, topology) as local_session:
        state = await _inspect_session(local_session, topology)
    return replace_finding(state, None if snapshot is None else describe_change(snapshot.topology, topology)), True


async def _inspect_session(session: Session, topology: Topology) -> MeshState:
    """Inspects all nodes of the topology through the mesh of this session."""
    from gpumesh.mesh.inspection.fresh_inspection import inspect_mesh

    return await inspect_mesh(session.wait_first_report, partial(_read_output, session), topology)


async def _read_output(session: Session, node: str, argv: Sequence[str]) -> bytes:
    """The output of a command on the node's host, cut to ``MAX_COMMAND_OUTPUT`` bytes. Raises GPUMeshError if the
    command cannot be run."""
    from gpumesh.event_loop.async_iterators import closing_iterator
    from gpumesh.mesh.inspection.node_inspection import MAX_COMMAND_OUTPUT

    output = bytearray()
    async with closing_iterator(session.exec(node, argv)) as chunks:
        async for chunk in chunks:
            output += chunk.data
            if len(output) > MAX_COMMAND_OUTPUT:
                break
    return bytes(output[:MAX_COMMAND_OUTPUT])


# -- --write ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Correction:
    """The proposed new text of mesh.yaml.

    ``new_text`` equals ``old_text`` if nothing needs a change, or nothing can be written. ``changes``: the differences
    between the two. ``remaining_findings``: the findings that no change settles. ``manual_steps``: changes that could
    not be written, for a person to make.
    """

    path: Path
    old_text: str
    new_text: str
    changes: tuple[Change, ...]
    remaining_findings: tuple[Finding, ...]
    manual_steps: tuple[str, ...] = ()

    @property
    def diff(self) -> str:
        """The changes as a unified diff, with two lines of context."""
        name = self.path.name
        lines = difflib.unified_diff(
            self.old_text.splitlines(), self.new_text.splitlines(), name, f"{name} (corrected)", n=2
        )
        return "\n".join(line.rstrip("\n") for line in lines)  # ``difflib`` ends its own lines with a line feed

    def write(self) -> bool:
        """Writes the file, unless the text is the same, and returns whether it was written. Raises GPUMeshError if the
        file cannot be written."""
        from gpumesh.config.editing import edit, node_changes

        if self.new_text == self.old_text:
            return False
        with node_changes.locked_file(self.path):
            edit.write(self.path, self.old_text, self.new_text)
        return True


def propose_correction(path: Path, text: str, topology: Topology, state: MeshState) -> Correction:
    """Plans the changes that the findings call for, and applies them to the text one after the other.

    After each change the new text is read again. It must mean the old configuration with this change, and nothing else.
    If it does not, or if the text cannot be changed there, the change becomes a manual step."""
    from gpumesh.audit import changes
    from gpumesh.config.editing import edit
    from gpumesh.config.editing.yaml_positions import CannotEdit

    node_indexes = {spec.name: index for index, spec in enumerate(topology.nodes)}
    new_text = text
    applied_changes: list[Change] = []
    manual_steps: list[str] = []
    for change in changes.plan_changes(topology, state.nodes, state.findings):
        comment = None if change.why is None else f"gpumesh audit, {state.at:%Y-%m-%d}: {change.why}"
        file_edit = edit.Edit(node_indexes[change.node], change.path, change.value, comment)
        try:
            edited_text = edit.apply_edits(new_text, [file_edit])
            expected_topology = changes.apply_changes(topology, [*applied_changes, change])
            if edit.parse_edited(path, edited_text) != expected_topology:
                raise CannotEdit(f"{change.node}: {'.'.join(change.path)} cannot be set by itself")
        except GPUMeshError as error:  # CannotEdit, or the ConfigError of a text that is no valid mesh.yaml any more
            manual_steps.append(f"{error.message}: it should be {change.value!r}")
            continue
        new_text = edited_text
        applied_changes.append(change)
    remaining_findings = changes.unsettled_findings(state.findings, applied_changes)
    return Correction(path, text, new_text, tuple(applied_changes), remaining_findings, tuple(manual_steps))


def _offer_correction(correction: Correction, *, yes: bool, is_running_mesh: bool, quiet: bool) -> Sequence[Finding]:
    """Shows the diff, and writes the file if ``yes`` is set or the user agrees; else ends the command. Returns the
    findings that remain.

    ``is_running_mesh``: a mesh runs in the background, and has read the old file. Raises UsageError if nobody can be
    asked, and Abort if the user does not agree."""
    from gpumesh.cli.views.findings import print_findings

    typer.echo("")
    for line in correction.manual_steps:
        typer.echo(clean_text(f"by hand: {line}"), err=True)
    if correction.new_text == correction.old_text:
        if correction.remaining_findings:
            typer.echo("nothing in mesh.yaml would put this right")
        else:
            typer.echo("mesh.yaml is as it should be")
        return correction.remaining_findings
    typer.echo(clean_text(correction.diff))
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody is there to agree to this change", hint="look at the diff, then add --yes")
        typer.confirm(clean_line(f"Write {correction.path}?"), abort=True, err=True)
    correction.write()
    if not quiet:
        typer.echo(clean_line(f"written: {correction.path}"), err=True)
        if is_running_mesh:
            typer.echo(_describe_takeover(correction), err=True)
    if correction.remaining_findings:
        typer.echo("\nleft to you:")
        print_findings(correction.remaining_findings)
    return correction.remaining_findings


def _describe_takeover(correction: Correction) -> str:
    """The sentence that says when the running mesh takes over the corrected file."""
    from gpumesh.config.comparison import APPLY_HINT, AUTO_HINT
    from gpumesh.config.editing import edit
    from gpumesh.topology import ReloadMode

    mode = edit.parse_edited(correction.path, correction.new_text).gateway.reload
    return AUTO_HINT if mode is ReloadMode.AUTO else APPLY_HINT


# -- --json ----------------------------------------------------------------------------------------------------------


def audit_document(
    topology: Topology, state: MeshState, correction: Correction | None = None, *, written: bool = False
) -> dict[str, object]:
    """The document of ``audit --json``, of the schema ``gpumesh.audit/1``. ``written``: the correction was written to
    mesh.yaml."""
    from gpumesh.audit import find_machines
    from gpumesh.cli.views.audit_rows import compare_nodes
    from gpumesh.wire import to_json

    enabled = {spec.name for spec in topology.nodes if spec.enabled}
    document: dict[str, object] = {
        "schema": "gpumesh.audit/1",
        "mesh": state.mesh,
        "at": state.at,
        "findings": state.findings,
        "nodes": [
            {"name": node.name, "health": node.health, "reason": node.reason, "routes": node.routes}
            for node in state.nodes
        ],
        "comparison": list(compare_nodes(topology, state.nodes, state.findings)),
        "machines": [
            {
                "nodes": machine.nodes,
                "gpus": [gpu.uuid for gpu in machine.gpus],
                "certain": machine.certain,
                "proof": machine.proof,
            }
            for machine in find_machines([node for node in state.nodes if node.name in enabled])
        ],
    }
    if correction is not None:
        changes = [
            {"node": change.node, "path": ".".join(change.path), "value": change.value, "why": change.why}
            for change in correction.changes
        ]
        document |= {
            "changes": changes,
            "diff": correction.diff,
            "written": written,
            "left": correction.remaining_findings,
        }
    result: dict[str, object] = to_json(document)
    return result
