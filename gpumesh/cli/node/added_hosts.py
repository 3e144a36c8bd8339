"""Adds hosts to a mesh.yaml that is there: finds out what they have, and writes their nodes behind the others."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer

from gpumesh.cli.init.confirm_keys import confirm_host_keys
from gpumesh.cli.init.mesh_yaml import node_lines
from gpumesh.cli.init.new_file import print_drafts
from gpumesh.cli.init.node_drafts import Draft, with_unique_names
from gpumesh.cli.init.probe_drafts import probe_drafts
from gpumesh.cli.node.mesh_change import change_file
from gpumesh.cli.open_session import run_async
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.config import edit, node_changes
from gpumesh.config.node_changes import ChangedText
from gpumesh.errors import GPUMeshError, UsageError
from gpumesh.state import TunnelPhase
from gpumesh.text.quoting import paste_command
from gpumesh.topology import NodeSpec, Topology

UNCHANGED = "mesh.yaml was left as it is"


def join_words(words: Sequence[str]) -> list[str]:
    """The hosts that the words of the command line name. A person may forget the quotes around an ssh command line:
    words with options among them are one line."""
    is_one_line = len(words) > 1 and (words[0] == "ssh" or any(word.startswith("-") and word != "-" for word in words))
    return [shlex.join(words)] if is_one_line else list(words)


class AddedHosts:
    """The hosts to add, as drafts, and the file that gets them.

    ``is_named``: a person has chosen the name, which is then an error if it is taken; other names get a number."""

    def __init__(self, path: Path, drafts: Sequence[Draft], *, is_named: bool) -> None:
        self._path = path
        self._is_named = is_named
        self._drafts = tuple(drafts)

    def probe(self, *, yes: bool, force: bool, quiet: bool) -> list[Draft]:
        """Looks at the hosts, and returns the drafts with what was found. Asks a person about new host keys.

        Raises UsageError for a node that is there already; raises GPUMeshError if a host cannot be reached, unless
        ``force``. The file is not changed."""
        text = edit.read(self._path)
        _, named_drafts = self._insert(text, self._drafts)
        topology = self._read_topology(named_drafts)
        if not self._is_named:
            _refuse_known_hosts(edit.parse_edited(self._path, text), topology)
        confirm_host_keys(topology, yes=yes, consequence=UNCHANGED)
        if not quiet:
            typer.echo(clean_line(f"looking at {', '.join(draft.name for draft in named_drafts)} …"), err=True)
        probed_drafts = run_async(probe_drafts(named_drafts, self._read_topology))
        if not quiet:
            print_drafts(probed_drafts)
        unreached = [draft for draft in probed_drafts if not _is_reached(draft)]
        if unreached and not force:
            draft = unreached[0]
            reason = "no answer" if draft.state is None else draft.state.reason
            raise GPUMeshError(
                f"{draft.name} cannot be reached, so {UNCHANGED}: {reason}",
                hint="--force adds it all the same",
                node=draft.name,
            )
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
        changed, _ = self._insert(edit.read(self._path), drafts)
        names = {draft.name for draft in drafts}
        nodes = tuple(node for node in changed.topology.nodes if node.name in names)
        return replace(changed.topology, nodes=nodes, models=(), redis=None)


def _is_reached(draft: Draft) -> bool:
    return draft.state is not None and draft.state.tunnel.state is TunnelPhase.UP


def _refuse_known_hosts(old: Topology, new: Topology) -> None:
    """Raises UsageError if a node of ``new`` leads to the same login as a node of ``old``."""
    for node in new.nodes:
        for known in old.nodes:
            if _login(node) is not None and _login(node) == _login(known):
                raise UsageError(
                    f"{known.name} is that host already",
                    hint=f"{paste_command('gpumesh node edit {NODE}', NODE=known.name)} changes it;"
                    " --name adds the host a second time",
                )


def _login(node: NodeSpec) -> tuple[object, ...] | None:
    ssh = node.ssh
    return None if ssh is None or not ssh.host else (ssh.host, ssh.port, ssh.user, ssh.proxy_jump)
