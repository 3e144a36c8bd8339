"""`gpumesh init`: from a provider's ssh line to a mesh.yaml, after looking at what is there."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from gpumesh.cli.context import run, settings
from gpumesh.cli.lazy import new_app
from gpumesh.cli.ssh_line import SshLine, parse_ssh
from gpumesh.cli.text import clean_line
from gpumesh.errors import ExitCode, UsageError
from gpumesh.state import BackendPhase, NodeState
from gpumesh.topology import BackendKind, Topology

REPORT_S = 12.0
# Where inference servers listen: Ollama, then behind a provider's proxy, llama.cpp, vLLM, LM Studio.
PORTS = (11434, 80, 8080, 8000, 1234)
LOCAL = "local"

app = new_app()


@dataclass(frozen=True, slots=True)
class Draft:
    """A node as it will stand in the file. ``ssh`` are its keys and values; ``None``: this machine."""

    name: str
    ssh: dict[str, str | int] | None
    kind: BackendKind = BackendKind.OLLAMA
    ports: tuple[int, ...] = PORTS
    found: NodeState | None = None


@app.command()
def init(
    ctx: typer.Context,
    from_: Annotated[
        list[str] | None, typer.Option("--from", metavar="'ssh …'", help="An ssh command line; repeatable.")
    ] = None,
    from_ssh_config: Annotated[
        list[str] | None, typer.Option("--from-ssh-config", metavar="HOST", help="A Host of ~/.ssh/config; repeatable.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-O", help="The file to write.")] = Path("mesh.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Trust host keys that are new without asking.")] = False,
) -> None:
    """Write a commented mesh.yaml after looking at what is there: servers, models, GPUs.

    An inference server on this machine is found by itself. A host that cannot be reached is written down all the
    same, with the reason.

    \b
    Examples:
      gpumesh init --from 'ssh root@203.0.113.7 -p 13323 -i ~/.ssh/id_ed25519'
      gpumesh init --from-ssh-config workstation --from 'ssh root@198.51.100.9 -p 22010'
    """
    chosen = settings(ctx)
    if output.exists() and not force:
        raise UsageError(f"{output} is there already", hint="--force overwrites it, --output names another file")
    drafts = _drafts([parse_ssh(line) for line in from_ or ()], from_ssh_config or ())
    _trust_new(drafts, yes=yes)
    if not chosen.quiet:
        typer.echo(f"looking at {len(drafts)} place{'s' if len(drafts) > 1 else ''} …", err=True)
    drafts = run(_looked_at(drafts))
    found = [draft for draft in drafts if draft.ssh is not None or _serves(draft)]
    if not found:
        raise UsageError(
            "there is no inference server on this machine, and no other place was named",
            hint="gpumesh init --from 'ssh root@HOST -p PORT'",
        )
    _write(output, "\n".join(document(found)) + "\n", force=force)
    for draft in found:
        typer.echo(_summary(draft), err=True)
    typer.echo(f"wrote {output}; `gpumesh up` starts it")
    if not all(_serves(draft) for draft in found):
        raise typer.Exit(int(ExitCode.DEGRADED))


def _drafts(lines: Sequence[SshLine], aliases: Sequence[str]) -> list[Draft]:
    """One for each place, each with a name of its own, and one for this machine."""
    drafts: list[Draft] = []
    for line in lines:
        ssh: dict[str, str | int] = {"host": line.host, "port": line.port}
        for key, value in (("user", line.user), ("identity_file", line.identity), ("proxy_jump", line.jump)):
            if value is not None:
                ssh[key] = value
        drafts.append(Draft(line.name, ssh))
    drafts += [Draft(parse_ssh(alias).name, {"alias": alias}) for alias in aliases]
    drafts.append(Draft(LOCAL, None))
    taken: set[str] = set()
    for position, draft in enumerate(drafts):
        name, number = draft.name, 2
        while name in taken:
            name, number = f"{draft.name}-{number}", number + 1
        taken.add(name)
        drafts[position] = replace(draft, name=name)
    return drafts


def _topology(drafts: Sequence[Draft]) -> Topology:
    """By way of a file: aliases, defaults and checks are then those of any mesh.yaml."""
    from gpumesh import config

    with tempfile.TemporaryDirectory(prefix="gpumesh-init-") as folder:
        file = Path(folder) / "mesh.yaml"
        file.write_text("\n".join(document(drafts)) + "\n", encoding="utf-8")
        return config.load(file)


def _trust_new(drafts: Sequence[Draft], *, yes: bool) -> None:
    """Host keys that nobody has seen: asked about now, since a probe with a strict policy would only fail."""
    from gpumesh.cli.trust import confirm_key
    from gpumesh.errors import GPUMeshError

    if not yes and not sys.stdin.isatty():
        return
    for spec in _topology(drafts).nodes:
        if spec.ssh is not None and not spec.ssh.proxy_jump:
            try:
                confirm_key(spec, spec.ssh, yes=yes)
            except GPUMeshError as error:
                typer.echo(clean_line(f"{spec.name}: {error.message}"), err=True)


async def _looked_at(drafts: Sequence[Draft]) -> list[Draft]:
    """What is there, asked as Ollama first, and where that finds nothing as a server of OpenAI's kind."""
    first = await _probe(list(drafts))
    missing = [replace(draft, kind=BackendKind.OPENAI, ports=PORTS) for draft in first if not _serves(draft)]
    second = {draft.name: draft for draft in await _probe(missing)} if missing else {}
    return [second[draft.name] if draft.name in second and _serves(second[draft.name]) else draft for draft in first]


async def _probe(drafts: Sequence[Draft]) -> list[Draft]:
    from gpumesh.mesh.mesh import Mesh

    async with Mesh(_topology(drafts)) as mesh:
        state = await mesh.first_report(REPORT_S)
        looked = []
        for draft in drafts:
            node = state.node(draft.name)
            if node.backend.state is not BackendPhase.UP:
                looked.append(replace(draft, found=node))
                continue
            urls = mesh.tunnel(draft.name).urls
            port = next((target.port for target, url in urls.items() if url == node.backend.url), None)
            looked.append(replace(draft, found=node, ports=draft.ports if port is None else (port,)))
    return looked


def _serves(draft: Draft) -> bool:
    return draft.found is not None and draft.found.backend.state is BackendPhase.UP


def _summary(draft: Draft) -> str:
    node = draft.found
    if node is None or node.backend.state is not BackendPhase.UP:
        return clean_line(f"{draft.name}: {node.reason if node is not None and node.reason else 'no answer'}")
    gpus = ", ".join(gpu.name for gpu in node.gpus or ()) or "no GPU seen"
    return clean_line(
        f"{draft.name}: {draft.kind} {node.backend.version or ''} with {gpus}, {len(node.backend.models)} models"
    )


# -- the file --------------------------------------------------------------------------------------------------------


def document(drafts: Sequence[Draft]) -> Iterator[str]:
    """The lines of mesh.yaml. Values are JSON strings where they need quotes: YAML reads them the same."""
    yield "# What there is, and how to reach it. For your editor: `gpumesh config schema`."
    yield "version: 1"
    yield "name: home"
    yield "gateway:"
    yield "  listen: 127.0.0.1:11430   # the one address for all clients"
    models = sorted({name for draft in drafts if draft.found is not None for name in draft.found.backend.models})
    if models:
        yield f"  # default_model: {_scalar(models[0])}"
    yield "nodes:"
    for draft in drafts:
        yield from _node(draft)


def _node(draft: Draft) -> Iterator[str]:
    node = draft.found
    yield f"  - name: {_scalar(draft.name)}"
    if node is not None and node.backend.state is not BackendPhase.UP:
        yield f"    # not seen when this was written: {clean_line(node.reason or 'no answer', 200)}"
    if draft.ssh is not None:
        yield f"    ssh: {_flow(draft.ssh)}"
    if len(draft.ports) == 1 and draft.ssh is not None:
        yield f"    backend: {_flow({'kind': draft.kind.value, 'port': draft.ports[0]})}"
    else:
        urls = [f"http://127.0.0.1:{port}" for port in draft.ports]
        joined = ", ".join(_scalar(url) for url in urls)
        yield f"    backend: {{kind: {draft.kind.value}, urls: [{joined}]}}   # the first that answers is used"
    if node is not None and node.backend.state is BackendPhase.UP:
        yield from _expect(node)


def _expect(node: NodeState) -> Iterator[str]:
    """What was found becomes what is expected: `gpumesh audit` tells when it is no longer so."""
    expect: dict[str, str | int] = {}
    if node.host.hostname:
        expect["hostname"] = node.host.hostname
    if node.gpus:
        expect["gpus"] = len(node.gpus)
        if len({gpu.name for gpu in node.gpus}) == 1:
            expect["gpu"] = node.gpus[0].name
        sizes = {gpu.memory_total_mib for gpu in node.gpus}
        if len(sizes) == 1 and (size := sizes.pop()) is not None:
            expect["vram_mib"] = size
    models = ", ".join(_scalar(name) for name in node.backend.models)
    said = [f"{key}: {_scalar(value)}" for key, value in expect.items()] + ([f"models: [{models}]"] if models else [])
    if said:
        yield f"    expect: {{{', '.join(said)}}}"


def _flow(values: dict[str, str | int]) -> str:
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in values.items()) + "}"


def _scalar(value: str | int) -> str:
    """Text is always quoted, and ``${`` doubled: a host's own words are neither YAML nor variables."""
    return str(value) if isinstance(value, int) else json.dumps(clean_line(value, 300)).replace("${", "$${")


def _write(path: Path, text: str, *, force: bool) -> None:
    """Whole or not at all; never over a file that came to be meanwhile."""
    try:
        if not force:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            return
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
