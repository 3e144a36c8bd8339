"""Parses YAML into a tree of values with their line and column; finds duplicate keys, tabs, endless aliases.

This module knows YAML, but not the keys of mesh.yaml. Scalars stay text: the key decides whether ``12e5`` is a number
or a container's name. So YAML's surprises (``no`` as false, ``22:30`` as 1350) do not occur. All sizes are bounded, so
that no file takes long to read. An alias counts with the size of the value that it stands for.
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

_NULLS = ("", "~", "null", "Null", "NULL")  # scalars without quotes that mean null
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
    """A list. ``size`` is the number of all values in it, itself included."""

    values: tuple[Value, ...]
    position: Position
    size: int


@dataclass(frozen=True, slots=True)
class MappingValue:
    """A mapping. ``entries`` has the position and the value of each key. ``size`` is the number of all values in it,
    itself included."""

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
    """Writes the path as a person does: ``nodes[2].ssh.port``. Unprintable keys are quoted, and long keys are cut."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{_display_key(part)}"
    return text.removeprefix(".")


def _display_key(key: str) -> str:
    """Returns the key as a message shows it: cut if it is long, quoted if it is not printable."""
    short_key = key if len(key) <= MAX_KEY_SHOWN else key[: MAX_KEY_SHOWN - 1] + "…"
    return short_key if short_key.isprintable() else repr(short_key)


def follow_path(tree: Value, path: KeyPath) -> tuple[int, Position, Value]:
    """Follows ``path`` from the root ``tree`` as far as ``path`` exists in the tree.

    Returns the number of steps, and the position and the value of the last key or list member that exists.
    """
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


class _StopParsing(Exception):
    """Ends the recursion after a fault that leaves nothing useful to read."""


def parse_yaml(text: str) -> tuple[Value | None, list[Fault]]:
    """Returns the tree and its faults. The tree is ``None`` for an empty text and for a text that is not YAML."""
    text = text.removeprefix("\ufeff")  # the byte order mark, with which some editors begin a file
    if len(text) > MAX_CHARACTERS:
        return None, [Fault(f"is larger than {MAX_CHARACTERS // 1024} KiB, which no mesh.yaml is")]
    forbidden = _UNPRINTABLE.search(text)
    if forbidden is not None:
        message = f"the character {_character_name(forbidden[0])} may not stand in YAML"
        return None, [Fault(message, position_at(text, forbidden.start()))]
    composer = _Composer(yaml.parse(text, Loader=_LOADER))
    try:
        return composer.read_document(), composer.faults
    except _StopParsing:  # the last fault says what has stopped the parsing
        return None, composer.faults
    except yaml.YAMLError as error:
        # Earlier faults (a duplicate key) are kept. The first syntax error hides everything after it.
        return None, composer.faults + _syntax_faults(text, error)


def position_at(text: str, index: int) -> Position:
    """Returns the position of the character at ``index``. A line ends with LF, CR LF or CR."""
    before = text[:index].replace("\r\n", "\n").replace("\r", "\n")
    _, _, start_of_line = before.rpartition("\n")
    return Position(line=before.count("\n") + 1, column=len(start_of_line) + 1)


def _character_name(character: str) -> str:
    name = f"U+{ord(character):04X}"
    return f"{name} (a UTF-16 file?)" if character == "\x00" else name


def _syntax_faults(text: str, error: yaml.YAMLError) -> list[Fault]:
    """Returns the faults of a text that the parser could not read: tabs that indent lines, and the parser's error."""
    faults = _find_tab_indents(text)
    syntax_fault = _syntax_fault(error)
    # The parser reports a tab, too, but as a character that "cannot start any token": one message is enough.
    tab_lines = {fault.position.line for fault in faults if fault.position is not None}
    if syntax_fault.position is None or syntax_fault.position.line not in tab_lines:
        faults.append(syntax_fault)
    return faults


def _syntax_fault(error: yaml.YAMLError) -> Fault:
    """Returns the parser's error as a fault, at the position that the parser reports."""
    if not isinstance(error, yaml.MarkedYAMLError):  # only a MarkedYAMLError has a position
        return Fault("is not YAML")
    mark = error.problem_mark or error.context_mark
    message = " ".join(part for part in (error.context, error.problem) if part)
    position = Position(mark.line + 1, mark.column + 1) if mark is not None else None
    return Fault(f"this is not YAML: {message or 'it cannot be read'}", position)


def _find_tab_indents(text: str) -> list[Fault]:
    """Returns a fault for each line that a tab indents: the most common syntax error, and the least visible."""
    message = "a tab indents this line: YAML allows only spaces there"
    faults = []
    for line_number, line in enumerate(text.splitlines(), start=1):
        indent = _TAB_INDENT.match(line)
        if indent is not None:
            faults.append(Fault(message, Position(line_number, indent.end())))
    return faults


@dataclass(slots=True)
class _Composer:
    """Turns the parser's events into values, recursively. Collects the faults that it meets.

    A method that gets an ``event`` reads the value that begins with this event; ``path`` is where the value stands.
    """

    events: Iterator[yaml.Event]
    faults: list[Fault] = field(default_factory=list)
    anchors: dict[str, Value | None] = field(default_factory=dict)  # ``None`` while the anchor's value is being read
    value_count: int = 0

    def read_document(self) -> Value | None:
        """Returns the value of the whole text; ``None`` for an empty text.

        Reads all events, so that a fault in the last line is found.
        """
        result: Value | None = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent) and result is not None:
                self.faults.append(
                    Fault("a second document begins here: one file holds one mesh", _event_position(event))
                )
                raise _StopParsing
            if isinstance(event, yaml.NodeEvent):
                result = self.read_value(event, ())
        return result

    def read_value(self, event: yaml.Event, path: KeyPath) -> Value:
        """Returns a value of any kind. Follows an alias, and remembers the value of an anchor."""
        position = _event_position(event)
        if isinstance(event, yaml.AliasEvent):
            return self.resolve_alias(str(event.anchor), position, path)
        if len(path) > MAX_DEPTH:
            # The message names only the start of the path: all of it would be longer than a line.
            self.faults.append(Fault(f"is nested more than {MAX_DEPTH} deep", position, path[:4]))
            raise _StopParsing
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self.anchors[anchor] = None  # not complete yet: an alias inside its own value would be endless
        result = self.read_node(event, position, path)
        if anchor is not None:
            self.anchors[anchor] = result
        return result

    def read_node(self, event: yaml.Event, position: Position, path: KeyPath) -> Value:
        """Returns a scalar, list or mapping; a ``BrokenValue`` if its tag has no meaning in a mesh.yaml."""
        self.count_values(1, position, path)
        result: Value
        if isinstance(event, yaml.ScalarEvent):
            result = self.read_scalar(event, position, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            result = self.read_list(position, path)
        else:
            result = self.read_mapping(position, path)
        tag = getattr(event, "tag", None)
        has_usual_meaning = tag in (None, "!") or tag in _CORE_TAGS  # None: there is no tag; `!` names no type
        if not has_usual_meaning:
            self.faults.append(Fault(f"the tag {str(tag)[:60]!r} has no meaning here", position, path))
            return BrokenValue(position)
        return result

    def resolve_alias(self, name: str, position: Position, path: KeyPath) -> Value:
        """Returns the value of the anchor ``name``; a ``BrokenValue`` if the anchor is missing or not complete yet."""
        target = self.anchors.get(name)
        if target is None:
            reason = "stands inside what it refers to" if name in self.anchors else "refers to nothing before it"
            self.faults.append(Fault(f"the alias *{name[:60]} {reason}", position, path))
            return BrokenValue(position)
        self.count_values(_size(target), position, path)
        return target

    def count_values(self, count: int, position: Position, path: KeyPath) -> None:
        """Adds ``count`` to the number of values in the file. Stops the parsing when the number exceeds the limit."""
        self.value_count += count
        if self.value_count > MAX_VALUES:
            self.faults.append(Fault(f"the file grows to more than {MAX_VALUES} values here", position, path))
            raise _StopParsing

    def read_scalar(self, event: yaml.ScalarEvent, position: Position, path: KeyPath) -> Value:
        """Returns the scalar as text or null; a ``BrokenValue`` if it has a character that YAML forbids."""
        if _is_plain(event) and event.value in _NULLS:
            return ScalarValue(None, position)
        # An escape in double quotes can produce a character that the file itself may not contain.
        forbidden = _UNPRINTABLE.search(event.value)
        if forbidden is not None:
            message = f"the character {_character_name(forbidden[0])} has no place in a setting"
            self.faults.append(Fault(message, position, path))
            return BrokenValue(position)
        return ScalarValue(event.value, position)

    def events_until(self, end_event: type[yaml.Event]) -> Iterator[yaml.Event]:
        """Yields the next events up to ``end_event``. The caller reads the rest of each value that an event begins."""
        for event in self.events:
            if isinstance(event, end_event):
                return
            yield event

    def read_list(self, position: Position, path: KeyPath) -> ListValue:
        """Returns the list whose start event has been read."""
        members: list[Value] = []
        for event in self.events_until(yaml.SequenceEndEvent):
            members.append(self.read_value(event, (*path, len(members))))
        return ListValue(tuple(members), position, 1 + sum(map(_size, members)))

    def read_mapping(self, position: Position, path: KeyPath) -> MappingValue:
        """Returns the mapping whose start event has been read, with the entries that its merge keys (``<<``) add.
        Reports a key that is given twice."""
        entries: dict[str, tuple[Position, Value]] = {}
        merge_values: list[Value] = []
        for event in self.events_until(yaml.MappingEndEvent):
            key_position = _event_position(event)
            key = self.read_key(event, path)
            value = self.read_value(next(self.events), (*path, key if key is not None else "?"))
            if key is None:  # the value was read only for its own faults
                continue
            # A key "<<" in quotes is an ordinary key.
            if key == "<<" and isinstance(event, yaml.ScalarEvent) and _is_plain(event):
                merge_values.extend(value.values if isinstance(value, ListValue) else [value])
            elif key in entries:
                first_position, _ = entries[key]
                message = f"this key is given twice; it stands on line {first_position.line} already"
                self.faults.append(Fault(message, key_position, (*path, key)))
            else:
                entries[key] = (key_position, value)
        for merge_value in merge_values:
            if isinstance(merge_value, MappingValue):
                # The mapping's own entries take precedence, then the entries of an earlier merge.
                entries = {**merge_value.entries, **entries}
            elif not isinstance(merge_value, BrokenValue):
                self.faults.append(Fault("<< takes an alias of a mapping", merge_value.position, path))
        return MappingValue(entries, position, 1 + sum(_size(value) for _, value in entries.values()))

    def read_key(self, event: yaml.Event, path: KeyPath) -> str | None:
        """Returns the text of a key. If the key is empty or not a text, returns ``None`` and adds a fault."""
        value = self.read_value(event, path)
        if isinstance(value, ScalarValue) and value.text:
            return value.text
        if not isinstance(value, BrokenValue):
            self.faults.append(Fault("a key must be a word", value.position, path))
        return None


def _size(value: Value) -> int:
    """Returns the number of all values in ``value``, itself included."""
    return value.size if isinstance(value, (ListValue, MappingValue)) else 1


def _event_position(event: yaml.Event) -> Position:
    mark = event.start_mark
    return Position(mark.line + 1, mark.column + 1) if mark is not None else Position(1, 1)


def _is_plain(event: yaml.ScalarEvent) -> bool:
    """Whether the scalar has no quotes and no tag, and is no block. For such a scalar, one of the two parsers reports
    the style ``None``, the other an empty text."""
    return not event.style and event.tag is None
