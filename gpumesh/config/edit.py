"""Edits single values of a mesh.yaml and leaves every other byte as it was: comments, blanks, quotes, order.

The file is not written anew from a tree: a round trip through ruamel.yaml keeps comments, but changes blanks and line
breaks of every flow mapping. Instead each edit is inserted at the position that the YAML parser reports for the value.
An edit that would have to change more text (a value behind an alias, a block scalar) is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from gpumesh import atomic_file
from gpumesh.config import find_file
from gpumesh.config.mesh_file import reader
from gpumesh.errors import GPUMeshError
from gpumesh.printable import printable
from gpumesh.quoting import yaml_text
from gpumesh.topology import Topology


@dataclass(frozen=True, slots=True)
class Edit:
    """A new value for one key. ``node`` is the index in ``nodes``, ``path`` the keys below that node. ``comment`` is
    added behind the value if the rest of the line is empty."""

    node: int
    path: tuple[str, ...]
    value: str | int | bool
    comment: str | None = None


class CannotEdit(GPUMeshError):
    """The value is written in a way that only a person can change."""

    code = "config-edit"
    default_hint = "change it by hand"


def apply_edits(text: str, edits: Sequence[Edit]) -> str:
    """The edited text. ``text`` must be a valid mesh.yaml. Raises CannotEdit."""
    for edit in edits:
        text = _apply_edit(text, edit)
    return text


def read(path: Path) -> str:
    """The file's text. Raises ConfigError."""
    return reader.read_text(path, find_file.display_path(path))


def parse_edited(path: Path, text: str) -> Topology:
    """The topology that the file would give with this text. Raises ConfigError."""
    return reader.parse_file_text(text, path)


def write(path: Path, old: str, new: str) -> None:
    """Replaces the file atomically. Its mode stays the same, and a link stays a link.

    Raises GPUMeshError when the file cannot be written, or when its text is not ``old`` any more.
    """
    target = Path(os.path.realpath(path))
    if read(target) != old:
        raise GPUMeshError(f"{path} was changed meanwhile; it was left as it is", hint="run the command again")
    try:
        mode = target.stat().st_mode & 0o7777
        atomic_file.replace(target, new, mode=mode)
    except OSError as error:
        raise GPUMeshError(
            f"{path} cannot be written: {error.strerror}",
            hint="it was left as it is; check the folder's owner and mode",
        ) from error


# -- one edit --------------------------------------------------------------------------------------------------------

_ALIAS_TAG = "alias"  # of the scalar that stands for an alias in the tree


class _Loader(yaml.SafeLoader):
    """The parser in Python, whose marks count characters; those of libyaml may not. Aliases are not resolved."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]  # its stubs have no types here
            return yaml.ScalarNode(_ALIAS_TAG, event.anchor, event.start_mark, event.end_mark)
        return super().compose_node(parent, index)


def _apply_edit(text: str, edit: Edit) -> str:
    parent = _node_entry(text, edit.node)
    for depth, key in enumerate(edit.path):
        pair = _find_pair(parent, key)
        if pair is None:
            return _insert_entry(text, parent, edit.path[depth:], edit)
        value = pair[1]
        if depth == len(edit.path) - 1:
            return _replace_value(text, value, edit)
        if _is_empty(value):
            raise CannotEdit(f"{_format_path(edit, depth)} has nothing behind it")
        if not isinstance(value, yaml.MappingNode):
            raise CannotEdit(f"{_format_path(edit, depth)} is not written out there")
        parent = value
    raise AssertionError("a path has at least one key")


def _format_path(edit: Edit, depth: int) -> str:
    """The path to the key at ``depth`` of the edit's path, for a message."""
    return ".".join((f"nodes[{edit.node}]", *edit.path[: depth + 1]))


def _node_entry(text: str, index: int) -> yaml.MappingNode:
    root = yaml.compose(text, Loader=_Loader)
    pair = _find_pair(root, "nodes") if isinstance(root, yaml.MappingNode) else None
    nodes = pair[1].value if pair is not None and isinstance(pair[1], yaml.SequenceNode) else ()
    if index < len(nodes) and isinstance(nodes[index], yaml.MappingNode):
        entry: yaml.MappingNode = nodes[index]
        return entry
    raise CannotEdit(f"nodes[{index}] is not written out as an entry of `nodes`")


def _find_pair(mapping: yaml.MappingNode, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    for name, value in mapping.value:
        if isinstance(name, yaml.ScalarNode) and name.value == key:
            return name, value
    return None


def _is_empty(node: yaml.Node) -> bool:
    """Whether nothing stands behind the key, as in ``expect:``."""
    return bool(node.start_mark.index == node.end_mark.index)


def _replace_value(text: str, value: yaml.Node, edit: Edit) -> str:
    if not isinstance(value, yaml.ScalarNode) or value.style in ("|", ">"):
        raise CannotEdit(f"{_format_path(edit, len(edit.path))} is no plain value")
    quoted = value.style == '"' and isinstance(edit.value, str)
    new_value = yaml_text(str(edit.value)) if quoted else _format_value(edit.value)
    if _is_empty(value):
        new_value = f" {new_value}"
    return text[: value.start_mark.index] + new_value + text[value.end_mark.index :]


def _insert_entry(text: str, parent: yaml.MappingNode, path: tuple[str, ...], edit: Edit) -> str:
    """Adds the edit's value to ``parent`` under the keys ``path``. All keys but the first are written as ``{ … }``."""
    # A file that is JSON stays JSON.
    as_json = bool(parent.flow_style and parent.value and parent.value[0][0].style == '"')
    entry = yaml_text(edit.value) if as_json and isinstance(edit.value, str) else _format_value(edit.value)
    for depth, key in enumerate(reversed(path)):
        entry = f'"{key}": {entry}' if as_json else f"{key}: {entry}"
        if depth < len(path) - 1:
            entry = f"{{{entry}}}" if as_json else f"{{ {entry} }}"
    # The comment may hold text from a host. A line break in it would end the comment.
    comment = None if as_json or edit.comment is None else printable(edit.comment)
    return (_insert_into_flow if parent.flow_style else _insert_into_block)(text, parent, entry, comment)


def _insert_into_flow(text: str, parent: yaml.MappingNode, entry: str, comment: str | None) -> str:
    start, end = parent.start_mark.index, parent.end_mark.index
    if not parent.value:
        return f"{text[:start]}{{ {entry} }}{_add_comment(text[end:], comment)}"
    last_value_end = parent.value[-1][1].end_mark.index
    before_brace = text[last_value_end : end - 1]
    if not before_brace.strip():
        head = f"{text[:last_value_end]}, {entry}{before_brace}{text[end - 1]}"
        return head + _add_comment(text[end:], comment)
    # A comma or a comment follows the last value, so the end is not a safe position. The start always is one.
    after_brace = text[start + 1 :]
    before = " " if after_brace[0] == " " else ""
    behind = "" if after_brace[0].isspace() else " "
    return f"{text[: start + 1]}{before}{entry},{behind}{after_brace}"


def _insert_into_block(text: str, parent: yaml.MappingNode, entry: str, comment: str | None) -> str:
    leaf = _last_leaf(parent)
    if isinstance(leaf, yaml.ScalarNode) and leaf.style in ("|", ">"):
        raise CannotEdit("the entry ends in a block of text")
    leaf_end = leaf.end_mark.index
    line_end = next((index for index in range(leaf_end, len(text)) if text[index] in "\r\n"), len(text))
    newline = "\r\n" if "\r\n" in text else "\n"
    line = " " * parent.start_mark.column + entry + (f" # {comment}" if comment else "")
    return text[:line_end] + newline + line + text[line_end:]


def _last_leaf(node: yaml.Node) -> yaml.Node:
    """The last scalar or flow collection below ``node``. Its end is exact, while that of a block collection is reported
    where the next token begins."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        if isinstance(node, yaml.SequenceNode):
            node = node.value[-1]
            continue
        key, value = node.value[-1]
        node = key if _is_empty(value) else value  # an empty value is reported where the next token begins
    return node


def _add_comment(rest: str, comment: str | None) -> str:
    """``rest`` is the text behind a value. Returns it with the comment in front, unless more stands on the same
    line."""
    rest_of_line = rest.split("\n", 1)[0]
    if comment is None or rest_of_line.strip():
        return rest
    return f" # {comment}" + rest


def _format_value(value: str | int | bool) -> str:
    """The value as YAML, without quotes if every YAML reader then reads the same value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    has_plain_characters = all(character.isalnum() or character in " ._/+-()@" for character in value)
    plain = bool(value) and value == value.strip() and has_plain_characters
    if plain and value[0].isalnum() and yaml.safe_load(value) == value:
        return value
    return yaml_text(value)
