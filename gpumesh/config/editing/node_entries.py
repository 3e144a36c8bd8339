"""Inserts, removes and replaces whole entries of ``nodes`` in the text of a mesh.yaml, and leaves every other byte.

The list may be in block style (``- name: a``) or in brackets, also as JSON. A list behind an alias is refused. Pure:
only text is read and returned. The caller parses the result and compares what it means (``node_changes.py``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from gpumesh.config.editing.edit import format_value
from gpumesh.config.editing.yaml_positions import (
    CannotEdit,
    compose,
    find_last_leaf,
    find_line_end,
    find_line_start,
    find_value,
    is_empty,
    newline_of,
    skip_line_break,
)

_COMMENTED_ENTRY = re.compile(r"\s*#[#\s]*-(\s|$)")  # a comment that holds an entry of the list, switched off
_COMMA_AND_COMMENT = re.compile(r"[ \t]*(,?)[ \t]*(#[^\r\n]*)?(?=[\r\n]|$)")
_BRACKETS_WITHOUT_CONTENT = re.compile(r"\[\s*\]")


@dataclass(frozen=True, slots=True)
class EntryLines:
    """Where an entry of a list in block style is in the text: from the line of its dash to the end of its last line,
    with the line break. ``dash_column`` counts from 0."""

    start: int
    end: int
    dash_column: int


def has_entries(text: str) -> bool:
    """Whether a valid YAML text has a list ``nodes`` that is not empty."""
    root = compose(text)
    nodes = find_value(root, "nodes") if isinstance(root, yaml.MappingNode) else None
    return isinstance(nodes, yaml.SequenceNode) and bool(nodes.value)


def entry_text(text: str, index: int) -> str:
    """Returns the text of ``nodes[index]``: whole lines in block style, else the mapping alone. Raises CannotEdit."""
    start, end = find_entry(text, index)
    return text[start:end]


def replace_entry(text: str, index: int, new_entry: str) -> str:
    """Returns ``text`` with ``new_entry`` in the place of what ``entry_text`` returns. Raises CannotEdit."""
    start, end = find_entry(text, index)
    if _find_nodes(text).flow_style:
        return text[:start] + new_entry.strip() + text[end:]
    newline = newline_of(text)
    new_lines = newline.join(new_entry.strip("\r\n").splitlines())
    ends_with_break = text[start:end].endswith(("\r", "\n"))
    return text[:start] + new_lines + (newline if ends_with_break else "") + text[end:]


def insert_entry(text: str, lines: Sequence[str]) -> str:
    """Returns ``text`` with a new last entry of ``nodes``.

    ``lines`` is the entry in block style, without indentation: ``- name: a``, ``  backend: …``. In a list in brackets
    the entry is written in braces, without its comments. Raises CannotEdit.
    """
    root = compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise CannotEdit("mesh.yaml is no mapping")
    nodes = find_value(root, "nodes")
    newline = newline_of(text)
    if nodes is None:
        if root.flow_style:
            raise CannotEdit("mesh.yaml has no `nodes`, and is written in braces")
        gap = "" if text.endswith(("\r", "\n")) else newline
        return text + gap + newline.join(("nodes:", *_indent(lines, 2))) + newline
    if isinstance(nodes, yaml.SequenceNode) and nodes.value:
        return _insert_into_flow(text, nodes, lines) if nodes.flow_style else _insert_into_block(text, nodes, lines)
    return _fill_empty_list(text, root, nodes, lines)


def remove_entry(text: str, index: int) -> tuple[str, str]:
    """Returns ``text`` without ``nodes[index]``, and what was removed. The comments of the entry go with it: those
    inside it, and those directly above it. Raises CannotEdit, also for the only entry."""
    nodes = _find_nodes(text)
    if len(nodes.value) == 1:
        raise CannotEdit("it is the only node, and a mesh.yaml needs one")
    if nodes.flow_style:
        return _remove_from_flow(text, nodes, index)
    lines = _find_entry_lines(text, nodes, index)
    # Above the first entry, a comment is rather about the whole list.
    start = lines.start if index == 0 else _find_comments_above(text, lines)
    is_last = index == len(nodes.value) - 1
    removed = text[start : lines.end]
    end = lines.end
    if _is_blank_line_above(text, start) and (is_last or _is_blank_line_at(text, end)):
        start = find_line_start(text, _end_of_line_above(text, start))  # else two blank lines would be left
    elif index == 0 and _is_blank_line_at(text, end):
        end = skip_line_break(text, find_line_end(text, end))
    if end == len(text) and not text.endswith(("\r", "\n")):  # no line break at the end, as before
        start = _end_of_line_above(text, start)
    return text[:start] + text[end:], removed.strip("\r\n")


# -- where the entries are -------------------------------------------------------------------------------------------


def _find_nodes(text: str) -> yaml.SequenceNode:
    """Returns the list ``nodes``. Raises CannotEdit when it is not written out."""
    root = compose(text)
    nodes = find_value(root, "nodes") if isinstance(root, yaml.MappingNode) else None
    if not isinstance(nodes, yaml.SequenceNode):
        raise CannotEdit("`nodes` is not written out as a list")
    return nodes


def find_entry(text: str, index: int) -> tuple[int, int]:
    """Returns the start and the end of what ``entry_text`` returns. Raises CannotEdit."""
    nodes = _find_nodes(text)
    if nodes.flow_style:
        entry = nodes.value[index]
        return entry.start_mark.index, entry.end_mark.index
    lines = _find_entry_lines(text, nodes, index)
    return lines.start, lines.end


def _find_entry_lines(text: str, nodes: yaml.SequenceNode, index: int) -> EntryLines:
    """Returns where ``nodes[index]`` is, in a list in block style. The comment lines after it that are indented more
    than its dash belong to it. Raises CannotEdit when something else stands on its first line."""
    entry = nodes.value[index]
    dash = _find_dash(text, entry)
    start = find_line_start(text, dash)
    if text[start:dash].strip(" "):
        raise CannotEdit(f"nodes[{index}] does not begin on a line of its own")
    dash_column = dash - start
    end = find_line_end(text, _find_content_end(text, entry))
    while True:
        next_start = skip_line_break(text, end)
        next_end = find_line_end(text, next_start)
        line = text[next_start:next_end]
        is_own_comment = line.lstrip(" ").startswith("#") and len(line) - len(line.lstrip(" ")) > dash_column
        if next_start == end or not is_own_comment:
            return EntryLines(start, next_start, dash_column)
        end = next_end


def _find_dash(text: str, entry: yaml.Node) -> int:
    """Returns the position of the dash of an entry in block style."""
    dashes = (
        token.start_mark.index
        for token in yaml.scan(text, Loader=yaml.SafeLoader)
        if isinstance(token, yaml.BlockEntryToken)
    )
    position: int = max(dash for dash in dashes if dash < entry.start_mark.index)
    return position


def _find_content_end(text: str, entry: yaml.Node) -> int:
    """Returns the end of an entry's last value."""
    leaf = find_last_leaf(entry)
    end: int = leaf.end_mark.index
    is_text_block = isinstance(leaf, yaml.ScalarNode) and leaf.style in ("|", ">")
    if is_text_block or is_empty(leaf):  # the parser reports the start of the next token
        return len(text[:end].rstrip())
    return end


def _find_comments_above(text: str, lines: EntryLines) -> int:
    """Returns the start of the comment lines directly above an entry, in its dash's column; the start of the entry if
    there are none, or if one of them is an entry that a person has switched off."""
    start = lines.start
    while start > 0:
        previous_start = find_line_start(text, _end_of_line_above(text, start))
        line = text[previous_start:start]
        if not line.startswith(" " * lines.dash_column + "#"):
            break
        if _COMMENTED_ENTRY.match(line):
            return lines.start
        start = previous_start
    return start


def _end_of_line_above(text: str, line_start: int) -> int:
    """Returns the position of the line break before ``line_start``, which is the start of a line."""
    return line_start - (2 if text[max(line_start - 2, 0) : line_start] == "\r\n" else min(line_start, 1))


def _is_blank_line_above(text: str, line_start: int) -> bool:
    if line_start == 0:
        return False
    return not text[find_line_start(text, _end_of_line_above(text, line_start)) : line_start].strip()


def _is_blank_line_at(text: str, line_start: int) -> bool:
    """Whether the line that begins at ``line_start`` is blank. False at the end of the text."""
    return line_start < len(text) and not text[line_start : find_line_end(text, line_start)].strip()


# -- a list in block style -------------------------------------------------------------------------------------------


def _insert_into_block(text: str, nodes: yaml.SequenceNode, lines: Sequence[str]) -> str:
    """Adds an entry at the end of a list in block style (a line with a dash for each entry), as far to the right as the
    last entry."""
    last = _find_entry_lines(text, nodes, len(nodes.value) - 1)
    newline = newline_of(text)
    new_lines = _indent(lines, last.dash_column)
    has_blank_lines_between = len(nodes.value) > 1 and _is_blank_line_above(text, _find_comments_above(text, last))
    if has_blank_lines_between:
        new_lines.insert(0, "")
    block = newline.join(new_lines)
    if text[: last.end].endswith(("\r", "\n")):
        return text[: last.end] + block + newline + text[last.end :]
    return text + newline + block  # the text ends without a line break, and still does


def _fill_empty_list(text: str, root: yaml.MappingNode, nodes: yaml.Node, lines: Sequence[str]) -> str:
    """Returns ``text`` with the first entry of a list that has none: ``nodes:`` or ``nodes: []``."""
    start, end = nodes.start_mark.index, nodes.end_mark.index
    is_null = isinstance(nodes, yaml.ScalarNode) and nodes.tag == "tag:yaml.org,2002:null"
    has_brackets = _BRACKETS_WITHOUT_CONTENT.fullmatch(text[start:end]) is not None
    if root.flow_style and has_brackets:
        return f"{text[:start]}[{_format_flow(_load_entry(lines), as_json=True)}]{text[end:]}"
    if root.flow_style or not (is_null or has_brackets):
        raise CannotEdit("`nodes` is not written out as a list")
    if is_empty(nodes):  # the parser reports the start of the next token, which may be some lines below the key
        key = next(key for key, value in root.value if value is nodes)
        start = end = text.index(":", key.end_mark.index) + 1
    line_end = find_line_end(text, end)
    newline = newline_of(text)
    comment = text[end:line_end].rstrip()
    head = text[:start].rstrip(" ") + comment
    return head + newline + newline.join(_indent(lines, 2)) + (text[line_end:] or newline)


def _indent(lines: Sequence[str], columns: int) -> list[str]:
    return [" " * columns + line for line in lines]


# -- a list in brackets ----------------------------------------------------------------------------------------------


def _insert_into_flow(text: str, nodes: yaml.SequenceNode, lines: Sequence[str]) -> str:
    """Adds an entry at the end of a list in flow style (``[{…}, {…}]``): in a line of its own if the last entry has
    one."""
    last = nodes.value[-1]
    start, end = last.start_mark.index, last.end_mark.index
    entry = _format_flow(_load_entry(lines), as_json=_is_json(nodes))
    line_start = find_line_start(text, start)
    indentation = text[line_start:start]
    rest_of_line = _COMMA_AND_COMMENT.match(text, end)
    has_own_lines = not indentation.strip(" \t")
    if has_own_lines and rest_of_line is not None:
        comma = "" if rest_of_line[1] else ","
        own_comma = rest_of_line[1]  # a list whose last entry has a comma keeps one at its end
        line_end = rest_of_line.end()
        separator = newline_of(text) + indentation
        return f"{text[:end]}{comma}{text[end:line_end]}{separator}{entry}{own_comma}{text[line_end:]}"
    return f"{text[:end]}, {entry}{text[end:]}"


def _remove_from_flow(text: str, nodes: yaml.SequenceNode, index: int) -> tuple[str, str]:
    """Removes an entry of a list in flow style (``[{…}, {…}]``) with its comma. Returns the new text, and the entry's
    text."""
    entry = nodes.value[index]
    removed = text[entry.start_mark.index : entry.end_mark.index]
    if index == len(nodes.value) - 1:
        previous_end = nodes.value[index - 1].end_mark.index
        start, end = entry.start_mark.index, entry.end_mark.index
        rest_of_line = _COMMA_AND_COMMENT.match(text, end)
        comma, comment = "", ""
        has_own_lines = "\n" in text[previous_end:start]
        if (
            has_own_lines and rest_of_line is not None
        ):  # its comment goes with it, and the one of the entry before stays
            comma, end = rest_of_line[1], rest_of_line.end()
            comment = text[previous_end : find_line_end(text, previous_end)].replace(",", "", 1)
        return text[:previous_end] + comma + comment + text[end:], removed
    next_start = nodes.value[index + 1].start_mark.index
    return text[: entry.start_mark.index] + text[next_start:], removed


def _is_json(nodes: yaml.SequenceNode) -> bool:
    """Whether the first key of the list's first mapping stands in double quotes."""
    first = nodes.value[0]
    if not isinstance(first, yaml.MappingNode) or not first.value:
        return False
    first_key, _ = first.value[0]
    return bool(first_key.style == '"')


def _load_entry(lines: Sequence[str]) -> Any:
    """Returns the value of an entry that is given as ``lines`` in block style."""
    (entry,) = yaml.safe_load("\n".join(lines))
    return entry


def _format_flow(value: Any, *, as_json: bool) -> str:
    """Returns a value in braces, as YAML or as JSON."""
    if isinstance(value, dict):
        keys = ((f'"{key}"' if as_json else str(key), member) for key, member in value.items())
        members = ", ".join(f"{key}: {_format_flow(member, as_json=as_json)}" for key, member in keys)
        return f"{{{members}}}"
    if isinstance(value, str):
        value = value.replace(
            "$${", "${"
        )  # the reader's sign for text that is no variable; ``yaml_text`` writes it anew
    if isinstance(value, list):
        return "[" + ", ".join(_format_flow(member, as_json=as_json) for member in value) + "]"
    return format_value(value, as_json=as_json)
