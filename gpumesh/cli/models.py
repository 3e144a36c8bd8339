"""`gpumesh models`: the fleet's models, through Ollama's own API on each node."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumesh.cli import completion
from gpumesh.cli.context import Settings, open_session, run, settings
from gpumesh.cli.lazy import new_app
from gpumesh.cli.text import UNKNOWN, clean_line, gib, json_text
from gpumesh.errors import BackendError, BackendUnreachable, ExitCode, GPUMeshError, NoNodeError, UsageError
from gpumesh.state import BackendPhase, MeshState, NodeState

if TYPE_CHECKING:
    import httpx

    from gpumesh.topology import Topology

REPORT_S = 9.0
LOAD_TIMEOUT_S = 600.0
LINE_LIMIT = 1 << 20

NodesOption = Annotated[
    list[str] | None,
    typer.Option("--node", "-n", metavar="NODE", help="On this node; repeatable.", autocompletion=completion.nodes),
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", autocompletion=completion.models)]
AllOption = Annotated[bool, typer.Option("--all", help="On every node that is up.")]

app = new_app(invoke_without_command=True)


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the fleet. ``copies``: how many different things go by this name."""

    name: str
    size_mib: int | None
    parameters: str | None
    quantization: str | None
    nodes: tuple[str, ...]
    loaded: tuple[str, ...]
    copies: int


@app.callback()
def models(ctx: typer.Context) -> None:
    """The fleet's models: which node has which, and where it is in memory. Without a command: list."""
    if ctx.invoked_subcommand is None:
        run(_list(settings(ctx), as_json=False))


@app.command("list")
def list_(ctx: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """One table over all nodes that are up."""
    run(_list(settings(ctx), as_json=as_json))


async def _list(chosen: Settings, *, as_json: bool) -> None:
    from gpumesh.cli import render

    async with open_session(chosen) as session:
        state = await session.first_report(REPORT_S)
    rows = fleet_models(state)
    if as_json:
        keys = Row.__slots__
        document = {"schema": "gpumesh.models/1", "models": [{key: getattr(row, key) for key in keys} for row in rows]}
        typer.echo(json_text(document, indent=2))
        return
    cells = []
    for row in rows:
        note = f"{row.copies} different digests" if row.copies > 1 else ""
        size = UNKNOWN if row.size_mib is None else gib(row.size_mib)
        kind = " ".join(filter(None, (row.parameters, row.quantization))) or UNKNOWN
        cells.append((row.name, size, kind, ", ".join(row.nodes), ", ".join(row.loaded) or UNKNOWN, note))
    render.print_table(("MODEL", "GiB", "KIND", "NODES", "LOADED ON", ""), cells)
    for node in state.nodes:
        if node.backend.state is not BackendPhase.UP:
            reason = clean_line(node.reason or "no answer yet")
            typer.echo(f"{clean_line(node.name)} is not counted: {reason}", err=True)


def fleet_models(state: MeshState) -> list[Row]:
    """Every model that a node which is up has, by name."""
    infos: dict[str, list[Any]] = {}
    nodes: dict[str, list[str]] = {}
    loaded: dict[str, list[str]] = {}
    for node in state.nodes:
        if node.backend.state is not BackendPhase.UP:
            continue
        catalog = {info.name: info for info in node.backend.catalog}
        for name in node.backend.models:
            nodes.setdefault(name, []).append(node.name)
            if name in catalog:
                infos.setdefault(name, []).append(catalog[name])
        for model in node.backend.loaded:
            loaded.setdefault(model.name, []).append(node.name)
    rows = []
    for name in sorted(nodes):
        known = infos.get(name, [])
        rows.append(
            Row(
                name=name,
                size_mib=next((info.size_mib for info in known if info.size_mib is not None), None),
                parameters=next((info.parameter_size for info in known if info.parameter_size), None),
                quantization=next((info.quantization for info in known if info.quantization), None),
                nodes=tuple(nodes[name]),
                loaded=tuple(loaded.get(name, ())),
                copies=len({info.digest for info in known if info.digest}) or 1,
            )
        )
    return rows


@app.command()
def pull(ctx: typer.Context, model: ModelArgument, node: NodesOption = None, everywhere: AllOption = False) -> None:
    """Fetch a model from Ollama's library to nodes (--node, or --all), each straight from the library."""
    run(_each(settings(ctx), node, everywhere, "pull", model))


@app.command()
def rm(ctx: typer.Context, model: ModelArgument, node: NodesOption = None, everywhere: AllOption = False) -> None:
    """Delete a model from nodes' disks (--node, or --all that have it)."""
    run(_each(settings(ctx), node, everywhere, "rm", model))


@app.command()
def load(ctx: typer.Context, model: ModelArgument, node: NodesOption = None, everywhere: AllOption = False) -> None:
    """Load a model into GPU memory, so that the first prompt need not wait for it."""
    run(_each(settings(ctx), node, everywhere, "load", model))


@app.command()
def unload(ctx: typer.Context, model: ModelArgument, node: NodesOption = None, everywhere: AllOption = False) -> None:
    """Free the GPU memory that a model takes."""
    run(_each(settings(ctx), node, everywhere, "unload", model))


async def _each(chosen: Settings, names: Sequence[str] | None, everywhere: bool, what: str, model: str) -> None:
    """Does it on all chosen nodes side by side; one's failure does not stop the others."""
    import httpx

    topology = chosen.topology()
    async with open_session(chosen) as session:
        state = await session.first_report(REPORT_S)
        nodes = choose(state, names or (), everywhere=everywhere, holding=None if what == "pull" else model)
        failed = 0
        limits = httpx.Timeout(30.0, read=LOAD_TIMEOUT_S)
        async with httpx.AsyncClient(trust_env=False, timeout=limits) as client:

            async def one(node: NodeState) -> None:
                nonlocal failed
                try:
                    await _do(client, topology, node, what, model, quiet=chosen.quiet)
                    typer.echo(f"{node.name}: {what} {clean_line(model)}: done")
                except GPUMeshError as error:
                    failed += 1
                    typer.echo(f"{node.name}: {what} {clean_line(model)}: {clean_line(error.message)}", err=True)

            await asyncio.gather(*(one(node) for node in nodes))
    if failed:
        raise typer.Exit(int(ExitCode.FAILED))


def choose(state: MeshState, names: Sequence[str], *, everywhere: bool, holding: str | None) -> list[NodeState]:
    """The nodes that a command is for. Raises UsageError when that is not clear, NoNodeError when none can take it.

    ``holding``: only nodes that have this model can; it may be named without its tag.
    """
    from gpumesh.balancer.select import full_name

    known = {node.name for node in state.nodes}
    for name in names:
        if name not in known:
            raise UsageError(f"there is no node {name!r}", hint=f"the nodes are: {', '.join(sorted(known))}")
    able = [node for node in state.nodes if node.backend.state is BackendPhase.UP and node.backend.kind == "ollama"]
    if names:
        away = [name for name in names if name not in {node.name for node in able}]
        if away:
            raise NoNodeError(f"{', '.join(away)}: no Ollama server that answers there now", node=away[0])
        return [node for node in able if node.name in names]
    if holding is not None:
        able = [node for node in able if full_name(holding) in {full_name(name) for name in node.backend.models}]
    if not able:
        what = "no Ollama node is up" if holding is None else f"no Ollama node that is up has {holding!r}"
        raise NoNodeError(what)
    if len(able) > 1 and not everywhere:
        raise UsageError("on which node?", hint=f"--node {able[0].name}, or --all for {len(able)} nodes")
    return able


async def _do(
    client: httpx.AsyncClient, topology: Topology, node: NodeState, what: str, model: str, *, quiet: bool
) -> None:
    """One command on one node, straight to its server through the forwarded port. Raises BackendError."""
    from gpumesh import config

    variable = topology.node(node.name).backend.api_key_env
    key = None if variable is None else config.secret(variable, node=node.name)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    match what:
        case "pull":
            request = client.build_request(
                "POST", f"{node.backend.url}/api/pull", json={"model": model}, headers=headers
            )
        case "rm":
            request = client.build_request(
                "DELETE", f"{node.backend.url}/api/delete", json={"model": model}, headers=headers
            )
        case _:
            body: dict[str, Any] = {"model": model, "stream": False}
            if what == "unload":
                body["keep_alive"] = 0
            request = client.build_request("POST", f"{node.backend.url}/api/generate", json=body, headers=headers)
    last = ""
    async for line in _lines(client, request, node.name):
        said = progress_of(line)
        if said is not None and said != last and what == "pull" and not quiet:
            typer.echo(f"{node.name}: {said}", err=True)
            last = said


async def _lines(client: httpx.AsyncClient, request: httpx.Request, node: str) -> AsyncGenerator[dict[str, Any]]:
    import httpx

    try:
        response = await client.send(request, stream=True)
        try:
            rest = b""
            async for piece in response.aiter_bytes():
                *lines, rest = (rest + piece).split(b"\n")
                if len(rest) > LINE_LIMIT:
                    raise BackendError("the server's answer is not what Ollama would say", node=node)
                for line in lines:
                    yield _object(line, response.status_code, node)
            yield _object(rest, response.status_code, node)
        finally:
            await response.aclose()
    except httpx.HTTPError as error:
        raise BackendUnreachable(f"no answer: {error or type(error).__name__}", node=node) from error


def _object(line: bytes, status: int, node: str) -> dict[str, Any]:
    """A line of the answer. Raises BackendError for one that tells of an error."""
    entry: Any = {}
    if line.strip():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = {"error": line.decode("utf-8", "replace")} if status >= 400 else {}
    if not isinstance(entry, dict):
        entry = {}
    if "error" in entry or status >= 400:
        raise BackendError(clean_line(str(entry.get("error") or f"status {status}"), 300), node=node)
    result: dict[str, Any] = entry
    return result


def progress_of(entry: dict[str, Any]) -> str | None:
    """What a line of Ollama's progress says, in steps of a tenth."""
    said = entry.get("status")
    if not isinstance(said, str):
        return None
    done, whole = entry.get("completed"), entry.get("total")
    if isinstance(done, (int, float)) and isinstance(whole, (int, float)) and whole > 0:
        return f"{clean_line(said, 60)} {int(10 * done / whole) * 10} %"
    return clean_line(said, 60)
