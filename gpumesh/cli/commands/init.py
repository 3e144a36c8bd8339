"""`gpumesh init`: from a provider's ssh line to a mesh.yaml, after looking at what is there."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from gpumesh.cli.context import GlobalOptions, global_options, run_async
from gpumesh.cli.init.node_drafts import Draft, make_drafts, mesh_yaml_lines, summarize_draft
from gpumesh.cli.init.provider_pods import Pod, read_pods
from gpumesh.cli.init.ssh_command_line import SshLine, parse_ssh_line
from gpumesh.cli.lazy import new_app
from gpumesh.cli.text import clean_line
from gpumesh.errors import ConfigError, ExitCode, GPUMeshError, UsageError
from gpumesh.quoting import shell_word
from gpumesh.state import BackendPhase, TunnelPhase
from gpumesh.topology import BackendKind, Topology

FIRST_REPORT_TIMEOUT_S = 12.0
MAX_INPUT_BYTES = 16 << 20

app = new_app()


@app.command()
def init(
    ctx: typer.Context,
    from_: Annotated[
        list[str] | None,
        typer.Option(
            "--from", metavar="'ssh …'", help="An ssh command line, NAME='ssh …', or - for stdin; repeatable."
        ),
    ] = None,
    from_ssh_config: Annotated[
        list[str] | None, typer.Option("--from-ssh-config", metavar="HOST", help="A Host of ~/.ssh/config; repeatable.")
    ] = None,
    identity: Annotated[
        str | None, typer.Option("--identity", "-i", metavar="FILE", help="The key for hosts whose line names none.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-O", metavar="FILE", help="The file to write.")] = Path(
        "mesh.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Trust host keys that are new without asking.")] = False,
) -> None:
    """Write a commented mesh.yaml after looking at what is there: servers, models, GPUs.

    Servers on this machine's usual ports are found by themselves. With --from - the places come from standard input:
    ssh command lines, or the JSON that RunPod's API and `vastai show instances --raw` give. Without any of these, on a
    terminal, it asks. A host that cannot be reached is written down all the same, with the reason, and the exit code
    is 3.

    \b
    Examples:
      gpumesh init --from 'ssh root@203.0.113.7 -p 13323 -i ~/.ssh/id_ed25519'
      gpumesh init --from iceland='ssh root@203.0.113.7 -p 13323' --from-ssh-config workstation
      vastai show instances --raw | gpumesh init --from - --yes
    """
    chosen = global_options(ctx)
    _check_output(output, force=force)
    lines, pods = _places(from_ or ())
    if not (from_ or from_ssh_config) and not yes and sys.stdin.isatty():
        lines = _ask_for_lines()
    for pod in pods:
        if pod.unreachable_reason is not None:
            typer.echo(clean_line(f"{pod.name} is left out: {pod.unreachable_reason}"), err=True)
    made = make_drafts(lines, from_ssh_config or (), pods, identity=identity)
    _trust_new(made, yes=yes)
    if not chosen.quiet:
        remote = sum(draft.ssh is not None for draft in made)
        places = f"{remote} host{'' if remote == 1 else 's'} and this machine" if remote else "this machine"
        typer.echo(f"looking at {places} …", err=True)
    made = run_async(_looked_at(made))
    found = [draft for draft in made if draft.ssh is not None or draft.is_serving]
    if not found:
        raise UsageError(
            "there is no inference server on this machine, and no other place was named",
            hint="gpumesh init --from 'ssh root@HOST -p PORT'",
        )
    _write(output, "\n".join(mesh_yaml_lines(found)) + "\n", force=force)
    _report(chosen, output, found)
    if not all(draft.is_serving for draft in found):
        raise typer.Exit(int(ExitCode.DEGRADED))


def _report(chosen: GlobalOptions, output: Path, found: Sequence[Draft]) -> None:
    if not chosen.quiet:
        for draft in found:
            typer.echo(summarize_draft(draft), err=True)
            hint = None if draft.state is None or draft.is_serving else draft.state.tunnel.hint
            if hint:
                typer.echo(clean_line(f"  hint: {hint}"), err=True)
    given = "" if output == Path("mesh.yaml") else f" -c {shell_word(str(output))}"
    if any(draft.is_serving for draft in found):
        typer.echo(clean_line(f"wrote {output}; try it: gpumesh run{given} 'Hello'"))
    else:  # nobody could answer yet
        typer.echo(clean_line(f"wrote {output}; when a server is there: gpumesh audit{given}"))


# -- what the person says --------------------------------------------------------------------------------------------


def _places(texts: Sequence[str]) -> tuple[list[SshLine], list[Pod]]:
    lines: list[SshLine] = []
    pods: list[Pod] = []
    for text in texts:
        if text != "-":
            lines.append(parse_ssh_line(text))
            continue
        if sys.stdin.isatty():
            typer.echo("reading from the terminal; Ctrl-D ends the input", err=True)
        given = sys.stdin.buffer.read(MAX_INPUT_BYTES).decode("utf-8", "replace").removeprefix("\ufeff").strip()
        if given.startswith(("{", "[")):
            pods += read_pods(given)
        else:
            lines += [parse_ssh_line(line) for line in given.splitlines() if line.strip() and not line.startswith("#")]
    return lines, pods


def _ask_for_lines() -> list[SshLine]:
    """One line after the other; what cannot be read is asked again."""
    typer.echo("Where are your GPUs? Paste an ssh command line for each host; an empty line ends the list.", err=True)
    lines: list[SshLine] = []
    while True:
        try:
            text = typer.prompt(f"host {len(lines) + 1}", default="", show_default=False, err=True)
        except typer.Abort:
            typer.echo("", err=True)
            raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
        if not text.strip():
            return lines
        try:
            lines.append(parse_ssh_line(text))
        except UsageError as error:
            typer.echo(clean_line(error.message), err=True)
            if error.hint:
                typer.echo(clean_line(f"hint: {error.hint}"), err=True)


def _trust_new(made: Sequence[Draft], *, yes: bool) -> None:
    """Host keys that nobody has seen: asked about now, since a probe with a strict policy would only fail."""
    from gpumesh.cli.commands.trust import NotConfirmed, confirm_key

    if not yes and not sys.stdin.isatty():
        return
    for spec in _topology(made).nodes:
        if spec.ssh is not None:
            try:
                confirm_key(spec, spec.ssh, yes=yes)
            except typer.Abort:
                raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
            except NotConfirmed as error:
                raise NotConfirmed(f"{error.message}; no mesh.yaml was written", hint=error.hint) from None
            except GPUMeshError as error:
                typer.echo(clean_line(f"{spec.name}: {error.message}"), err=True)


# -- what is there ---------------------------------------------------------------------------------------------------


def _topology(made: Sequence[Draft]) -> Topology:
    """By way of a file: aliases, defaults and checks are then those of any mesh.yaml."""
    from gpumesh import config
    from gpumesh.tunnels.local_system.socket_folders import private_folder

    with private_folder() as folder:
        file = folder / "mesh.yaml"
        file.write_text("\n".join(mesh_yaml_lines(made)) + "\n", encoding="utf-8")
        try:
            return config.load(file)
        except ConfigError as error:  # of a file that nobody has seen: only what is wrong is of use
            raise UsageError("; ".join(problem.message for problem in error.problems)) from error


async def _looked_at(made: Sequence[Draft]) -> list[Draft]:
    """What is there, asked as Ollama first, and where that finds nothing as a server of OpenAI's kind."""
    first = await _probe(list(made))
    again = [replace(draft, kind=BackendKind.OPENAI) for draft in first if not draft.is_serving and _reachable(draft)]
    second = {draft.name: draft for draft in await _probe(again)} if again else {}
    return [second[draft.name] if draft.name in second and second[draft.name].is_serving else draft for draft in first]


def _reachable(draft: Draft) -> bool:
    return draft.state is None or draft.state.tunnel.state is TunnelPhase.UP


async def _probe(made: Sequence[Draft]) -> list[Draft]:
    from gpumesh.mesh.mesh import Mesh

    async with Mesh(_topology(made)) as mesh:
        state = await mesh.wait_first_report(FIRST_REPORT_TIMEOUT_S)
        looked = []
        for draft in made:
            node = state.node(draft.name)
            port = None
            if node.backend.state is BackendPhase.UP:
                urls = mesh.tunnel(draft.name).urls
                port = next((target.port for target, url in urls.items() if url == node.backend.url), None)
            looked.append(replace(draft, state=node, ports=draft.ports if port is None else (port,)))
        return looked


# -- the file --------------------------------------------------------------------------------------------------------


def _check_output(path: Path, *, force: bool) -> None:
    """Before anything takes time."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint=f"--output {shell_word(str(path / 'mesh.yaml'))}")
    if path.exists() and not force:
        raise UsageError(f"{path} is there already", hint="--force overwrites it, --output names another file")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}")


def _write(path: Path, text: str, *, force: bool) -> None:
    """Whole or not at all; never over a file that came to be meanwhile."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with beside.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if force:
                beside.replace(path)
            else:
                os.link(beside, path)
        finally:
            with suppress(FileNotFoundError):
                beside.unlink()
    except FileExistsError as error:
        raise UsageError(f"{path} is there already", hint="--force overwrites it") from error
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
