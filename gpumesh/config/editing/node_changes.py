"""Adds, removes and changes nodes of a mesh.yaml, and proves that the new text means exactly that and nothing else.

Each function takes the file's text and returns the new text. It reads both texts as the mesh would, and compares what
they mean: the new topology must be the old one with this change. Otherwise it raises CannotEdit, so that an unusual
file (anchors, text blocks) is refused and never damaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpumesh.config.editing import edit, node_entries
from gpumesh.config.editing.edit import Edit
from gpumesh.config.editing.yaml_positions import CannotEdit
from gpumesh.errors import ConfigError, Problem, UsageError, unknown_node
from gpumesh.files import file_lock
from gpumesh.text.quoting import paste_command
from gpumesh.topology import NodeSpec, Topology


@dataclass(frozen=True, slots=True)
class ChangedText:
    """The new text of a mesh.yaml and what it means. ``removed`` has the text of each node that is not in it any more.
    ``name``: the name that a changed node has now."""

    text: str
    topology: Topology
    removed: tuple[str, ...] = ()
    name: str = ""


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Holds the lock under which commands change this mesh.yaml: they read it, and write it, one after the other. On a
    file system without locks it holds none; ``edit.write`` then still refuses to overwrite another change."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(file_lock.locked_folder(path.resolve().parent))
        yield


def add_node(path: Path, text: str, lines: Sequence[str]) -> ChangedText:
    """Adds a node as the last one. ``lines`` are its entry (see ``node_entries.insert_entry``). Raises ConfigError if
    the text is no valid mesh.yaml, UsageError if it is none with the node, and CannotEdit."""
    old = _parse_nodes(path, text)
    new_text = node_entries.insert_entry(text, lines)
    try:
        topology = edit.parse_edited(path, new_text)
    except ConfigError as error:  # the old text is valid, so the new node is not
        index = 0 if old is None else len(old.nodes)
        raise UsageError("; ".join(_describe_problem(problem, index) for problem in error.problems)) from error
    # A mesh.yaml without a node is not valid, so there is no old topology to compare with.
    is_as_expected = len(topology.nodes) == 1 if old is None else replace(topology, nodes=topology.nodes[:-1]) == old
    if not is_as_expected:
        raise CannotEdit("a node cannot be added without changing other parts of mesh.yaml")
    return ChangedText(new_text, topology)


def remove_nodes(path: Path, text: str, names: Sequence[str]) -> ChangedText:
    """Removes these nodes. Raises UsageError for a node that is not there, or that other parts of the file name; raises
    CannotEdit and ConfigError as ``add_node``."""
    old = edit.parse_edited(path, text)
    indexes = sorted({find_node(old, name) for name in names}, reverse=True)  # the last first: positions stay right
    if len(indexes) == len(old.nodes):
        raise UsageError(
            "these are all nodes of mesh.yaml, which needs one" if len(indexes) > 1 else "it is the only node",
            hint="`gpumesh down` stops the mesh; `gpumesh node add` first, to replace the node by another",
        )
    new_text = text
    removed = []
    for index in indexes:
        new_text, removed_text = node_entries.remove_entry(new_text, index)
        removed.append(removed_text)
    shown_names = ", ".join(dict.fromkeys(names))
    try:
        topology = edit.parse_edited(path, new_text)
    except ConfigError as error:  # another part of the file names the node, or uses an anchor in its entry
        reasons = "; ".join(
            f"{problem.path}: {problem.message}" if problem.path else problem.message for problem in error.problems
        )
        raise UsageError(
            f"{shown_names} cannot be removed, because mesh.yaml would not be valid without it: {reasons}",
            hint="change these lines of mesh.yaml first",
        ) from error
    kept = tuple(node for index, node in enumerate(old.nodes) if index not in indexes)
    if topology != replace(old, nodes=kept):
        raise CannotEdit(f"{shown_names} cannot be removed without changing other parts of mesh.yaml")
    return ChangedText(new_text, topology, tuple(reversed(removed)))


def replace_node(path: Path, text: str, name: str, new_entry: str) -> ChangedText:
    """Gives the node another entry, which may also rename it. Raises UsageError if mesh.yaml would not be valid with
    it, and CannotEdit as ``add_node``."""
    old = edit.parse_edited(path, text)
    index = find_node(old, name)
    new_text = node_entries.replace_entry(text, index, new_entry)
    return _check_change(path, text, old, index, new_text)


def set_values(path: Path, text: str, name: str, edits: Sequence[Edit]) -> ChangedText:
    """Sets single values of a node; the ``node`` of each edit does not count. Raises as ``replace_node``."""
    old = edit.parse_edited(path, text)
    index = find_node(old, name)
    new_text = edit.apply_edits(text, [replace(single_edit, node=index) for single_edit in edits])
    return _check_change(path, text, old, index, new_text)


def nodes_of(path: Path, text: str) -> tuple[NodeSpec, ...]:
    """Returns the nodes of the file with this text; none if its list is empty. Raises ConfigError for any other problem
    of the file."""
    topology = _parse_nodes(path, text)
    return () if topology is None else topology.nodes


def find_node(topology: Topology, name: str) -> int:
    """Returns the node's index. Raises UsageError when there is no such node, also if the name is that of a pool."""
    names = [node.name for node in topology.nodes]
    if name in [pool.name for pool in topology.pools]:
        raise UsageError(
            f"{name} is a pool, and no node of mesh.yaml",
            hint=paste_command("gpumesh pool down {POOL}", POOL=name)
            + " stops it; it stands under `pools:` in mesh.yaml",
        )
    if name not in names:
        raise unknown_node(name, names)
    return names.index(name)


def _check_change(path: Path, text: str, old: Topology, index: int, new_text: str) -> ChangedText:
    """Returns the new text, if at most the node at ``index`` differs. Raises CannotEdit and UsageError."""
    try:
        topology = edit.parse_edited(path, new_text)
    except ConfigError as error:
        first_line = 1 + text.count("\n", 0, node_entries.find_entry(text, index)[0])
        reasons = [_describe_problem(problem, index, first_line) for problem in error.problems]
        raise UsageError("; ".join(reasons)) from error
    nodes: tuple[NodeSpec, ...] = topology.nodes
    is_as_expected = len(nodes) == len(old.nodes)
    if is_as_expected:
        expected_nodes = (*old.nodes[:index], nodes[index], *old.nodes[index + 1 :])
        is_as_expected = topology == replace(old, nodes=expected_nodes)
    if not is_as_expected:
        raise CannotEdit(f"the change would also change more than {old.nodes[index].name}")
    return ChangedText(new_text, topology, name=nodes[index].name)


def _describe_problem(problem: Problem, index: int, first_line: int | None = None) -> str:
    """The problem as a person sees it who looks at the entry of the node at ``index`` alone: ``ssh.port: …``. In text
    that is no YAML, the line is counted from ``first_line``, which is the entry's."""
    prefix = f"nodes[{index}]."
    if problem.path:
        return f"{problem.path.removeprefix(prefix)}: {problem.message}"
    if problem.line is None or first_line is None or problem.line < first_line:
        return problem.message
    return f"line {problem.line - first_line + 1}: {problem.message}"


def _parse_nodes(path: Path, text: str) -> Topology | None:
    """Returns what the text means; ``None`` if all that is wrong with it is that it has no node. Raises ConfigError."""
    try:
        return edit.parse_edited(path, text)
    except ConfigError as error:
        if [problem.path for problem in error.problems] == ["nodes"] and not node_entries.has_entries(text):
            return None
        raise
