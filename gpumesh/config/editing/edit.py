"""Edits single values of a mesh.yaml and leaves every other byte as it was: comments, blanks, quotes, order.

The file is not written from a tree: a round trip through ruamel.yaml keeps comments, but changes blanks and line
breaks of every flow mapping (``{ … }``). Instead each edit is inserted at the position that the YAML parser reports for
the value. An edit that would have to change more text (a value behind an alias, a block scalar) is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from gpumesh.config import find_file
from gpumesh.config.editing.yaml_positions import (
    CannotEdit,
    compose,
    find_last_leaf,
    find_line_end,
    find_value,
    is_empty,
    newline_of,
)
from gpumesh.config.mesh_file import reader
from gpumesh.errors import GPUMeshError
from gpumesh.files import atomic_file
from gpumesh.text.printable import printable
from gpumesh.text.quoting import yaml_text
from gpumesh.topology import Topology

EditValue = str | int | float | bool | tuple[str, ...]
"""A tuple is a list of texts."""


@dataclass(frozen=True, slots=True)
class Edit:
    """A new value for one key of a node. ``node`` is the node's index in ``nodes``; ``path`` holds the keys from there
    to the value: ``("expect", "gpus")``. ``comment`` is added behind the value if the rest of the line is empty."""

    node: int
    path: tuple[str, ...]
    value: EditValue
    comment: str | None = None


def apply_edits(text: str, edits: Sequence[Edit]) -> str:
    """Returns ``text``, which must be a valid mesh.yaml, with all edits. Raises CannotEdit."""
    for edit in edits:
        text = _apply_edit(text, edit)
    return text


def read(path: Path) -> str:
    """Returns the file's text. Raises ConfigError."""
    return reader.read_text(path, find_file.display_path(path))


def parse_edited(path: Path, text: str) -> Topology:
    """Returns the topology that the file would give with this text. Raises ConfigError."""
    return reader.parse_file_text(text, path)


def write(path: Path, old: str, new: str) -> None:
    """Replaces the file's text ``old`` by ``new``, atomically. The file's mode stays the same, and a link stays a link.

    Raises GPUMeshError when the file cannot be written, or when its text is not ``old`` any more.
    """
    target = Path(os.path.realpath(path))
    if read(target) != old:
        raise GPUMeshError(f"{path} was changed meanwhile; it was left as it is", hint="run the command again")
    try:
        if not os.access(target, os.W_OK):  # the folder may still allow to replace it, but its owner does not want that
            raise GPUMeshError(f"{path} is read-only; it was left as it is", hint="chmod u+w lets gpumesh write it")
        mode = target.stat().st_mode & 0o7777  # without the bits for the type of the file
        atomic_file.replace(target, new, mode=mode)
    except OSError as error:
        raise GPUMeshError(
            f"{path} cannot be written: {error.strerror}",
            hint="it was left as it is; check the folder's owner and mode",
        ) from error


# -- one edit --------------------------------------------------------------------------------------------------------


def _apply_edit(text: str, edit: Edit) -> str:
    """Returns ``text`` with one edit. Follows the edit's path as far as the file has its keys, then replaces the value,
    or inserts the keys that are missing."""
    parent = _find_node_entry(text, edit.node)
    last_depth = len(edit.path) - 1
    for depth, key in enumerate(edit.path):
        value = find_value(parent, key)
        if value is None:
            return _insert_entry(text, parent, edit.path[depth:], edit)
        if depth == last_depth:
            return _replace_value(text, value, edit)
        if is_empty(value):  # ``expect:`` alone: there is no mapping whose form the new key could have
            raise CannotEdit(f"{_format_path(edit, depth)} has nothing behind it")
        if not isinstance(value, yaml.MappingNode):  # an alias, for example
            raise CannotEdit(f"{_format_path(edit, depth)} is not written out there")
        parent = value
    raise AssertionError("the edit's path is empty")


def _format_path(edit: Edit, depth: int) -> str:
    """The path to the key at ``depth`` of the edit's path, for a message."""
    return ".".join((f"nodes[{edit.node}]", *edit.path[: depth + 1]))


def _find_node_entry(text: str, index: int) -> yaml.MappingNode:
    """Returns the mapping of ``nodes[index]`` in the text. Raises CannotEdit when it is not written out there."""
    root = compose(text)
    nodes = find_value(root, "nodes") if isinstance(root, yaml.MappingNode) else None
    entries = nodes.value if isinstance(nodes, yaml.SequenceNode) else ()
    if index < len(entries) and isinstance(entries[index], yaml.MappingNode):
        entry: yaml.MappingNode = entries[index]
        return entry
    raise CannotEdit(f"nodes[{index}] is not written out as an entry of `nodes`")


def _replace_value(text: str, value: yaml.Node, edit: Edit) -> str:
    """Returns ``text`` with the edit's value in place of ``value``. A text in double quotes gets double quotes again.
    Raises CannotEdit if ``value`` is a mapping, a block of text, or a list that no list in brackets replaces."""
    is_list_for_list = isinstance(value, yaml.SequenceNode) and value.flow_style and isinstance(edit.value, tuple)
    is_plain = isinstance(value, yaml.ScalarNode) and value.style not in ("|", ">")  # the styles of a block of text
    if not is_plain and not is_list_for_list:
        raise CannotEdit(f"{_format_path(edit, len(edit.path) - 1)} is no plain value")
    stays_quoted = isinstance(value, yaml.ScalarNode) and value.style == '"' and isinstance(edit.value, str)
    new_value = yaml_text(str(edit.value)) if stays_quoted else format_value(edit.value)
    if is_empty(value):  # the new value comes directly behind the colon
        new_value = f" {new_value}"
    return text[: value.start_mark.index] + new_value + text[value.end_mark.index :]


def _insert_entry(text: str, parent: yaml.MappingNode, path: tuple[str, ...], edit: Edit) -> str:
    """Returns ``text`` with the edit's value added to ``parent`` under the keys ``path``."""
    # A mapping in braces whose first key stands in double quotes is taken for JSON, and stays JSON.
    first_key, _ = parent.value[0] if parent.value else (None, None)
    as_json = bool(parent.flow_style) and first_key is not None and first_key.style == '"'
    entry = _format_entry(path, edit.value, as_json=as_json)
    # The comment may hold text from a host. A line break in it would end the comment. JSON has no comments.
    comment = None if as_json or edit.comment is None else printable(edit.comment)
    if parent.flow_style:
        return _insert_into_flow(text, parent, entry, comment)
    return _insert_into_block(text, parent, entry, comment)


def _format_entry(path: tuple[str, ...], value: EditValue, *, as_json: bool) -> str:
    """Writes the value under the keys ``path``: ``expect: { gpus: 2 }``, or as JSON ``"expect": {"gpus": 2}``."""
    *outer_keys, last_key = path
    text = format_value(value, as_json=as_json)
    entry = f'"{last_key}": {text}' if as_json else f"{last_key}: {text}"
    for key in reversed(outer_keys):
        entry = f'"{key}": {{{entry}}}' if as_json else f"{key}: {{ {entry} }}"
    return entry


def _insert_into_flow(text: str, parent: yaml.MappingNode, entry: str, comment: str | None) -> str:
    """Returns ``text`` with ``entry`` added to the mapping ``parent``, which is written in braces: at its end, with the
    comment behind the brace, or else at its start, without the comment."""
    start, end = parent.start_mark.index, parent.end_mark.index
    if text[start] != "{":  # the parser reports the start of an anchor or a tag, and no position of the brace
        raise CannotEdit("an anchor or a tag stands before the braces")
    content_start, content_end = start + 1, end - 1
    if not text[content_start:content_end].strip():  # ``{}``, perhaps with blanks
        return f"{text[:start]}{{ {entry} }}{_add_comment(text[end:], comment)}"
    if parent.value:
        _, last_value = parent.value[-1]
        last_value_end = last_value.end_mark.index
        if not text[last_value_end:content_end].strip():
            with_entry = f"{text[:last_value_end]}, {entry}{text[last_value_end:end]}"
            return with_entry + _add_comment(text[end:], comment)
    # A comma or a comment stands before the closing brace, so the entry cannot be added there. At the start it always
    # can.
    after_opening_brace = text[content_start:]
    blank_before = " " if after_opening_brace[0] == " " else ""
    separator = "," if parent.value else ""
    blank_after = "" if after_opening_brace[0].isspace() else " "
    return f"{text[:content_start]}{blank_before}{entry}{separator}{blank_after}{after_opening_brace}"


def _insert_into_block(text: str, parent: yaml.MappingNode, entry: str, comment: str | None) -> str:
    """Returns ``text`` with ``entry`` on a line of its own, after the last line of the block mapping ``parent``."""
    leaf = find_last_leaf(parent)
    if isinstance(leaf, yaml.ScalarNode) and leaf.style in ("|", ">"):  # the new line could become a part of the text
        raise CannotEdit("the entry ends in a block of text")
    line_end = find_line_end(text, leaf.end_mark.index)
    newline = newline_of(text)
    line = " " * parent.start_mark.column + entry + (f" # {comment}" if comment else "")
    return text[:line_end] + newline + line + text[line_end:]


def _add_comment(rest: str, comment: str | None) -> str:
    """Returns the comment and then ``rest``, the text behind a value. Omits the comment if the rest of the line is not
    empty."""
    rest_of_line, _, _ = rest.partition("\n")
    if comment is None or rest_of_line.strip():
        return rest
    return f" # {comment}" + rest


def format_value(value: EditValue, *, as_json: bool = False) -> str:
    """Returns the value as YAML, or as JSON. A text gets no quotes in YAML if every YAML reader reads the same value
    without them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, tuple):
        return f"[{', '.join(format_value(member, as_json=as_json) for member in value)}]"
    if as_json:
        return yaml_text(value)
    has_plain_characters = all(character.isalnum() or character in " ._/+-()@" for character in value)
    has_plain_ends = value[:1].isalnum() and value == value.strip()
    # The last condition is for a text such as ``12`` or ``true``: YAML would read a number or a truth value.
    if has_plain_characters and has_plain_ends and yaml.safe_load(value) == value:
        return value
    return yaml_text(value)
