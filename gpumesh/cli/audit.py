"""`gpumesh audit`: what mesh.yaml expects against what is found. The rules are gpumesh.audit's; this shows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from gpumesh.cli.context import open_session, run, settings
from gpumesh.cli.lazy import new_app
from gpumesh.cli.text import UNKNOWN, json_text, short_gpu
from gpumesh.errors import ExitCode
from gpumesh.state import Health, MeshState, NodeState, Severity
from gpumesh.topology import NodeSpec, Topology

REPORT_S = 7.0

app = new_app()


@app.command()
def audit(ctx: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """What mesh.yaml expects against what is found, and why they differ.

    Exit code 3 when there is any finding that is more than a remark.
    """
    from gpumesh.cli import render

    chosen = settings(ctx)
    topology = chosen.topology()

    async def look() -> MeshState:
        async with open_session(chosen) as session:
            return await session.first_report(REPORT_S)

    state = run(look())
    if as_json:
        typer.echo(json_text(document(state), indent=2))
    else:
        rows = [
            (
                name,
                what,
                expected,
                found,
                render.Cell(verdict, "green" if verdict in ("as expected", "up") else "yellow"),
            )
            for name, what, expected, found, verdict in comparison(topology, state)
        ]
        render.print_table(("NODE", "WHAT", "EXPECTED", "FOUND", "VERDICT"), rows, wrap=True)
        render.print_findings(state.findings)
    if any(finding.severity is not Severity.INFO for finding in state.findings):
        raise typer.Exit(int(ExitCode.DEGRADED))


def document(state: MeshState) -> dict[str, object]:
    """``gpumesh.audit/1``."""
    from gpumesh.wire import to_json

    findings = [
        {"code": f.code, "severity": f.severity, "node": f.node, "nodes": f.nodes, "message": f.message, "hint": f.hint}
        for f in state.findings
    ]
    nodes = [{"name": node.name, "health": node.health, "reason": node.reason} for node in state.nodes]
    result: dict[str, object] = to_json(
        {"schema": "gpumesh.audit/1", "mesh": state.mesh, "at": state.at, "findings": findings, "nodes": nodes}
    )
    return result


def comparison(topology: Topology, state: MeshState) -> Iterator[tuple[str, str, str, str, str]]:
    """Node, what, expected, found, verdict: a row for each node, and one for each thing that is expected of it."""
    for node in state.nodes:
        spec = topology.node(node.name)
        up = node.health is not Health.DOWN and node.health is not Health.UNKNOWN
        yield node.name, "route", _route(spec), str(node.tunnel.state), "up" if up else node.reason or str(node.health)
        for what, expected, found in _expectations(spec, node):
            verdict = "not known" if found is None else "as expected" if found == expected else "differs"
            yield "", what, expected, UNKNOWN if found is None else found or "none", verdict


def _route(spec: NodeSpec) -> str:
    if spec.ssh is not None:
        return f"{spec.ssh.user}@{spec.ssh.host}:{spec.ssh.port}"
    return ", ".join(target.url for target in spec.backend.targets)


def _expectations(spec: NodeSpec, node: NodeState) -> Iterator[tuple[str, str, str | None]]:
    expect, gpus = spec.expect, node.gpus
    if expect.hostname is not None:
        yield "hostname", expect.hostname, node.host.hostname
    if expect.gpus is not None:
        yield "GPUs", str(expect.gpus), None if gpus is None else str(len(gpus))
    if expect.gpu is not None:
        yield "GPU", short_gpu(expect.gpu), None if gpus is None else _all({short_gpu(gpu.name) for gpu in gpus})
    if expect.vram_mib is not None:
        sizes = None if gpus is None else {f"{gpu.memory_total_mib} MiB" for gpu in gpus if gpu.memory_total_mib}
        yield "VRAM", f"{expect.vram_mib} MiB", None if sizes is None else _all(sizes)
    if expect.driver is not None:
        yield "driver", expect.driver, node.host.driver
    for model in expect.models:
        known = node.backend.models if node.health is not Health.DOWN else None
        yield "model", model, None if known is None else model if model in known else ""


def _all(found: set[str]) -> str:
    return ", ".join(sorted(found))
