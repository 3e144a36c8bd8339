"""Adds hosts to a mesh.yaml that is there: finds out what they have, and writes their nodes behind the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer

from gpumesh import config
from gpumesh.cli.global_options import GlobalOptions
from gpumesh.cli.init.confirm_keys import confirm_host_keys
from gpumesh.cli.init.mesh_yaml import node_lines
from gpumesh.cli.init.new_file import print_hints, write_new_file
from gpumesh.cli.init.node_drafts import Draft, summarize_draft, with_unique_names
from gpumesh.cli.init.output_file import check_output
from gpumesh.cli.init.probe_drafts import probe_drafts
from gpumesh.cli.node.mesh_change import apply_change, change_file
from gpumesh.cli.open_session import run_async
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.config.editing import edit, node_changes
from gpumesh.config.editing.node_changes import ChangedText
from gpumesh.errors import ExitCode, GPUMeshError, HostKeyUnknown, UsageError
from gpumesh.state import TunnelPhase
from gpumesh.text.quoting import paste_command, shell_words
from gpumesh.text.sentences import join_all
from gpumesh.topology import NodeSpec, Topology

UNCHANGED = "mesh.yaml was left as it is"


def join_words(words: Sequence[str]) -> list[str]:
    """The hosts that the words of the command line name. A person may forget the quotes around an ssh command line:
    words with options among them are one line."""
    is_one_line = len(words) > 1 and (words[0] == "ssh" or any(word.startswith("-") and word != "-" for word in words))
    return [shell_words(words)] if is_one_line else list(words)


def add_hosts(options: GlobalOptions, drafts: list[Draft], *, name: str | None, force: bool, yes: bool) -> None:
    """Adds these hosts to the mesh.yaml in use, or writes one, and prints what the pool has then. Ends the command with
    exit code 3 if a host has no server that answers. Raises GPUMeshError."""

    if name is not None:
        if len(drafts) > 1:
            raise UsageError("--name is for one host", hint="NAME='ssh …' names each of several hosts")
        drafts = [replace(drafts[0], name=name)]
    path = _find_file(options)
    if path is None:
        _write_first_file(options, drafts, yes=yes)
        return
    hosts = AddedHosts(path, drafts, is_named=name is not None)
    changed, added = hosts.write(hosts.probe(yes=yes, force=force, quiet=options.quiet))
    for draft in added:
        typer.echo(clean_line(f"added {summarize_draft(draft)}"))
    apply_change(options, changed.topology)
    if not all(draft.is_serving for draft in added):
        raise typer.Exit(int(ExitCode.DEGRADED))


def _find_file(options: GlobalOptions) -> Path | None:
    """The mesh.yaml in use; ``None`` if there is none. Raises UsageError if there is one that cannot be used."""

    if not any(os.path.lexists(path) for path in config.search_paths(options.config)):
        return None
    return options.config_file()


def _write_first_file(options: GlobalOptions, drafts: list[Draft], *, yes: bool) -> None:
    """Writes the first mesh.yaml, as `init` does."""

    output, *_ = config.search_paths(options.config)
    check_output(output, force=False)
    write_new_file(output, with_unique_names(drafts), force=False, yes=yes, quiet=options.quiet)


class AddedHosts:
    """The hosts to add, as drafts, and the file that gets them.

    ``is_named``: a person has chosen the name, which is then an error if it is taken; other names get a number."""

    def __init__(self, path: Path, drafts: Sequence[Draft], *, is_named: bool) -> None:
        self._path = path
        self._is_named = is_named
        self._text = edit.read(path)
        self._drafts = self._leave_out_known(drafts)

    def probe(self, *, yes: bool, force: bool, quiet: bool) -> list[Draft]:
        """Looks at the hosts, and returns the drafts with what was found. Asks a person about new host keys. Raises
        GPUMeshError if a host cannot be reached, unless ``force``. The file is not changed."""
        _, named_drafts = self._insert(self._text, self._drafts)
        confirm_host_keys(self._read_topology(named_drafts), yes=yes, consequence=UNCHANGED)
        if not quiet:
            typer.echo(clean_line(f"looking at {', '.join(draft.name for draft in named_drafts)} …"), err=True)
        probed_drafts = run_async(probe_drafts(named_drafts, self._read_topology))
        unreached = [draft for draft in probed_drafts if not _is_reached(draft)]
        if unreached and not force:
            raise _unreached_error(unreached)
        if not quiet:
            print_hints(probed_drafts)
        return probed_drafts

    def write(self, probed_drafts: Sequence[Draft]) -> tuple[ChangedText, list[Draft]]:
        """Adds the drafts to the file. Returns the new text and the drafts with the names that they have in it: another
        command may have taken a name meanwhile. Raises GPUMeshError, and then the file is as it was."""
        named_drafts = list(probed_drafts)

        def change(text: str) -> ChangedText:
            nonlocal named_drafts
            changed, named_drafts = self._insert(text, probed_drafts)
            return changed

        return change_file(self._path, change), named_drafts

    def _insert(self, text: str, drafts: Sequence[Draft]) -> tuple[ChangedText, list[Draft]]:
        """Adds the drafts to the text, each under a name that is free."""
        taken = [node.name for node in node_changes.nodes_of(self._path, text)]
        named_drafts = with_unique_names(drafts, taken)
        for draft in drafts:
            if self._is_named and draft.name in taken:
                raise UsageError(
                    f"there is already a node {draft.name} in {self._path.name}",
                    hint=f"{paste_command('gpumesh node edit {NODE}', NODE=draft.name)} changes it",
                )
        changed: ChangedText | None = None
        for draft in named_drafts:
            changed = node_changes.add_node(self._path, text, list(node_lines(draft)))
            text = changed.text
        assert changed is not None, "there is at least one host"
        return changed, named_drafts

    def _read_topology(self, drafts: Sequence[Draft]) -> Topology:
        """The mesh of these drafts alone, with the defaults and the identity of the file that gets them."""
        changed, named_drafts = self._insert(self._text, drafts)
        names = {draft.name for draft in named_drafts}
        nodes = tuple(node for node in changed.topology.nodes if node.name in names)
        return replace(changed.topology, nodes=nodes, models=(), redis=None)

    def _leave_out_known(self, drafts: Sequence[Draft]) -> tuple[Draft, ...]:
        """The drafts whose host is no node of the file yet; all drafts if a person has chosen the name. Raises
        UsageError if none is left."""
        if self._is_named:
            return tuple(drafts)
        logins = {_login(node): node.name for node in node_changes.nodes_of(self._path, self._text)}
        logins.pop(None, None)
        new_drafts = []
        known_names = []
        for draft in drafts:
            (node,) = self._read_topology([draft]).nodes
            known_name = logins.get(_login(node))
            if known_name is None:
                new_drafts.append(draft)
            else:
                known_names.append(known_name)
        if not new_drafts:
            command = paste_command("gpumesh node edit {NODE}", NODE=known_names[0])
            raise UsageError(
                f"{join_all(known_names)} {'is that host' if len(known_names) == 1 else 'are these hosts'} already",
                hint=f"{command} changes it; --name adds the host a second time",
            )
        for name in known_names:
            typer.echo(clean_line(f"{name} is in {self._path.name} already, and stays as it is"), err=True)
        return tuple(new_drafts)


def _unreached_error(drafts: Sequence[Draft]) -> GPUMeshError:
    """The error for hosts that cannot be reached."""
    reasons = []
    hints = []
    for draft in drafts:
        tunnel = None if draft.state is None else draft.state.tunnel
        reasons.append(f"{draft.name}: {'no answer' if draft.state is None else draft.state.reason}")
        if tunnel is not None and tunnel.error_code == HostKeyUnknown.code:
            hints.append("compare the fingerprint on a terminal, or --yes trusts it")
        elif tunnel is not None and tunnel.hint is not None:
            hints.append(tunnel.hint)
    hints = [*dict.fromkeys(hints), "--force adds it all the same"]
    return GPUMeshError(f"{'; '.join(reasons)}; {UNCHANGED}", hint="; ".join(hints))


def _is_reached(draft: Draft) -> bool:
    return draft.state is not None and draft.state.tunnel.state is TunnelPhase.UP


def _login(node: NodeSpec) -> tuple[object, ...] | None:
    """What makes two nodes the same login; ``None`` if that cannot be told."""
    ssh = node.ssh
    return None if ssh is None or not ssh.host else (ssh.host, ssh.port, ssh.user, ssh.proxy_jump)
