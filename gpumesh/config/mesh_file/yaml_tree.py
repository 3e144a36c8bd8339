"""Parses YAML into a tree of values with their positions. Knows YAML, but not the keys of mesh.yaml.

Scalars stay text: the key decides whether ``12e5`` is a number or a container's name. So YAML's surprises (``no`` as
false, ``22:30`` as 1350) do not occur. All sizes are bounded, so that no file takes long to read. An alias counts with
the size of the value that it stands for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

# These bounds are far above any real mesh.yaml: one of a thousand nodes with ten values each stays below all of them.
MAX_CHARACTERS = 256 * 1024
MAX_DEPTH = 24
MAX_VALUES = 20_000
MAX_KEY_SHOWN = 60  # characters of a key in a message

_NULLS = ("", "~", "null", "Null", "NULL")
_CORE_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map"))
# Characters that YAML forbids. Surrogates cannot come from UTF-8, but a caller may pass them.
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TAB_INDENT = re.compile(r"^[ ]*\t")
# The parser of libyaml if PyYAML was built with it: the same events, a hundred times as fast.
_LOADER: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Position:
    """A position in the text; line and column count from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class ScalarValue:
    """A scalar; ``None`` is YAML's null."""

    text: str | None
    position: Position


@dataclass(frozen=True, slots=True)
class ListValue:
    values: tuple[Value, ...]
    position: Position
    size: int


@dataclass(frozen=True, slots=True)
class MappingValue:
    """``entries``: the position and the value of each key."""

    entries: dict[str, tuple[Position, Value]]
    position: Position
    size: int


@dataclass(frozen=True, slots=True)
class BrokenValue:
    """A value with a fault that has been reported already."""

    position: Position


Value: TypeAlias = ScalarValue | ListValue | MappingValue | BrokenValue
KeyPath: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Fault:
    """A problem at a position. ``path`` is empty if the text is not YAML."""

    message: str
    position: Position | None = None
    path: KeyPath = ()


def format_path(path: KeyPath) -> str:
    """The path as a person writes it: ``nodes[2].ssh.port``. Unprintable keys are quoted, and long keys are cut."""
    parts = "".join(f"[{part}]" if isinstance(part, int) else f".{_display_key(part)}" for part in path)
    return parts.removeprefix(".")


def _display_key(key: str) -> str:
    shown = key if len(key) <= MAX_KEY_SHOWN else key[: MAX_KEY_SHOWN - 1] + "…"
    return shown if shown.isprintable() else repr(shown)


def follow_path(tree: Value, path: KeyPath) -> tuple[int, Position, Value]:
    """Follows ``path`` as far as it exists. Returns the number of steps, the position of the last key, and its
    value."""
    position, value = tree.position, tree
    for steps, part in enumerate(path):
        if isinstance(value, MappingValue) and isinstance(part, str) and part in value.entries:
            position, value = value.entries[part]
        elif isinstance(value, ListValue) and isinstance(part, int) and part < len(value.values):
            value = value.values[part]
            position = value.position
        else:
            return steps, position, value
    return len(path), position, value


class _Stop(Exception):
    """Ends the recursion after a fault that leaves nothing useful to read."""


def parse_yaml(text: str) -> tuple[Value | None, list[Fault]]:
    """The tree and its faults. The tree is ``None`` for an empty text or one that is not YAML."""
    text = text.removeprefix("\ufeff")
    if len(text) > MAX_CHARACTERS:
        return None, [Fault(f"is larger than {MAX_CHARACTERS // 1024} KiB, which no mesh.yaml is")]
    if match := _UNPRINTABLE.search(text):
        return None, [
            Fault(f"the character {_character_name(match[0])} may not stand in YAML", position_at(text, match.start()))
        ]
    composer = _Composer(yaml.parse(text, Loader=_LOADER))
    try:
        return composer.read_document(), composer.faults
    except _Stop:
        return None, composer.faults
    except yaml.YAMLError as error:
        # Earlier faults (a duplicate key) are kept. The first syntax error hides everything after it.
        syntax_fault = _syntax_fault(error)
        tab_faults = _find_tab_indents(text)
        # The parser reports a tab, too, but as a character that "cannot start any token": one message is enough.
        tab_lines = {fault.position.line for fault in tab_faults if fault.position}
        if syntax_fault.position is None or syntax_fault.position.line not in tab_lines:
            tab_faults.append(syntax_fault)
        return None, composer.faults + tab_faults


def position_at(text: str, index: int) -> Position:
    """The position of the character at ``index``."""
    before = text[:index].replace("\r\n", "\n").replace("\r", "\n")
    return Position(before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)


def _character_name(character: str) -> str:
    return f"U+{ord(character):04X}" + (" (a UTF-16 file?)" if character == "\x00" else "")


def _syntax_fault(error: yaml.YAMLError) -> Fault:
    if not isinstance(error, yaml.MarkedYAMLError):
        return Fault("is not YAML")
    mark = error.problem_mark or error.context_mark
    message = " ".join(part for part in (error.context, error.problem) if part)
    position = Position(mark.line + 1, mark.column + 1) if mark is not None else None
    return Fault(f"this is not YAML: {message or 'it cannot be read'}", position)


def _find_tab_indents(text: str) -> list[Fault]:
    """Faults for lines that are indented with a tab: the most common syntax error, and the least visible."""
    message = "a tab indents this line: YAML allows only spaces there"
    indents = ((number, _TAB_INDENT.match(line)) for number, line in enumerate(text.splitlines(), 1))
    return [Fault(message, Position(number, match.end())) for number, match in indents if match]


@dataclass(slots=True)
class _Composer:
    """Turns parser events into values, recursively. An anchor whose value is still being read has ``None``."""

    events: Iterator[yaml.Event]
    faults: list[Fault] = field(default_factory=list)
    anchors: dict[str, Value | None] = field(default_factory=dict)
    value_count: int = 0

    def read_document(self) -> Value | None:
        """Reads all of the text, so that a fault in its last line is found."""
        result: Value | None = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent) and result is not None:
                self.faults.append(
                    Fault("a second document begins here: one file holds one mesh", _event_position(event))
                )
                raise _Stop
            if isinstance(event, yaml.NodeEvent):
                result = self.read_value(event, ())
        return result

    def read_value(self, event: yaml.Event, path: KeyPath) -> Value:
        position = _event_position(event)
        if isinstance(event, yaml.AliasEvent):
            return self.resolve_alias(str(event.anchor), position, path)
        if len(path) > MAX_DEPTH:
            # The message names only the start of the path: all of it would be longer than a line.
            self.faults.append(Fault(f"is nested more than {MAX_DEPTH} deep", position, path[:4]))
            raise _Stop
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self.anchors[anchor] = None  # until it is complete: an alias inside itself would be endless
        result = self.read_node(event, position, path)
        if anchor is not None:
            self.anchors[anchor] = result
        return result

    def read_node(self, event: yaml.Event, position: Position, path: KeyPath) -> Value:
        self.count_values(1, position, path)
        result: Value
        if isinstance(event, yaml.ScalarEvent):
            result = self.read_scalar(event, position, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            result = self.read_list(position, path)
        else:
            result = self.read_mapping(position, path)
        tag = getattr(event, "tag", None)
        if tag not in (None, "!") and tag not in _CORE_TAGS:
            self.faults.append(Fault(f"the tag {str(tag)[:60]!r} has no meaning here", position, path))
            return BrokenValue(position)
        return result

    def resolve_alias(self, name: str, position: Position, path: KeyPath) -> Value:
        target = self.anchors.get(name)
        if target is None:
            reason = "stands inside what it refers to" if name in self.anchors else "refers to nothing before it"
            self.faults.append(Fault(f"the alias *{name[:60]} {reason}", position, path))
            return BrokenValue(position)
        self.count_values(_size(target), position, path)
        return target

    def count_values(self, count: int, position: Position, path: KeyPath) -> None:
        self.value_count += count
        if self.value_count > MAX_VALUES:
            self.faults.append(Fault(f"the file grows to more than {MAX_VALUES} values here", position, path))
            raise _Stop

    def read_scalar(self, event: yaml.ScalarEvent, position: Position, path: KeyPath) -> Value:
        if _is_plain(event) and event.value in _NULLS:
            return ScalarValue(None, position)
        # An escape in double quotes can produce a character that the file itself may not contain.
        if match := _UNPRINTABLE.search(event.value):
            self.faults.append(
                Fault(f"the character {_character_name(match[0])} has no place in a setting", position, path)
            )
            return BrokenValue(position)
        return ScalarValue(event.value, position)

    def read_list(self, position: Position, path: KeyPath) -> ListValue:
        members: list[Value] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            members.append(self.read_value(event, (*path, len(members))))
        return ListValue(tuple(members), position, 1 + sum(map(_size, members)))

    def read_mapping(self, position: Position, path: KeyPath) -> MappingValue:
        entries: dict[str, tuple[Position, Value]] = {}
        merge_values: list[Value] = []  # of `<<`: other mappings whose entries count where this one has none
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key_position = _event_position(event)
            key = self.read_key(event, path)
            value = self.read_value(next(self.events), (*path, key if key is not None else "?"))
            if key is None:
                continue
            if key == "<<" and isinstance(event, yaml.ScalarEvent) and _is_plain(event):
                merge_values.extend(value.values if isinstance(value, ListValue) else [value])
            elif key in entries:
                message = f"this key is given twice; it stands on line {entries[key][0].line} already"
                self.faults.append(Fault(message, key_position, (*path, key)))
            else:
                entries[key] = (key_position, value)
        for other in merge_values:
            if isinstance(other, MappingValue):
                entries = {**other.entries, **entries}
            elif not isinstance(other, BrokenValue):
                self.faults.append(Fault("<< takes an alias of a mapping", other.position, path))
        return MappingValue(entries, position, 1 + sum(_size(value) for _, value in entries.values()))

    def read_key(self, event: yaml.Event, path: KeyPath) -> str | None:
        value = self.read_value(event, path)
        if isinstance(value, ScalarValue) and value.text:
            return value.text
        if not isinstance(value, BrokenValue):
            self.faults.append(Fault("a key must be a word", value.position, path))
        return None


def _size(value: Value) -> int:
    """The number of values in it, itself included."""
    return value.size if isinstance(value, (ListValue, MappingValue)) else 1


def _event_position(event: yaml.Event) -> Position:
    mark = event.start_mark
    return Position(mark.line + 1, mark.column + 1) if mark is not None else Position(1, 1)


def _is_plain(event: yaml.ScalarEvent) -> bool:
    """Whether the scalar is neither quoted nor a block. One of the two parsers then reports ``None`` as its style, the
    other an empty string."""
    return not event.style and event.tag is None
