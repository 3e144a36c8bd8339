"""The types of the values in mesh.yaml. Each reads one value, and has the JSON Schema of the value's form.

A value arrives as the YAML has it: a text, a list, a mapping or ``None``. So each type here parses text. A type reports
all problems of a value, also those of the values inside it. A section (file_schema.py) is a mapping with known keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, StrEnum, auto
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar, cast, dataclass_transform

import msgspec

from gpumesh.config import value_parsers
from gpumesh.config.mesh_file.variable_expansion import UNUSABLE
from gpumesh.config.mesh_file.yaml_tree import KeyPath

JsonSchema: TypeAlias = Mapping[str, Any]

# For the message about a value of another type: the start of a sentence that goes on with "expected here".
SINGLE_VALUE = "a single value is"
WHOLE_NUMBER = "a whole number is"
NUMBER = "a number is"
TRUE_OR_FALSE = "true or false is"
LIST = "a list is"
KEYS_WITH_VALUES = "keys with values are"


class KeyProblem(Enum):
    UNKNOWN = auto()
    MISSING = auto()


class WrongType(msgspec.Struct, frozen=True):
    """The value is a list in the place of a text, for example. ``expected`` is one of the phrases above."""

    expected: str


class NotAChoice(msgspec.Struct, frozen=True):
    """The value is none of ``choices``."""

    choices: list[str]


class ValueProblem(msgspec.Struct, frozen=True):
    """What is wrong with the value at ``path``. A ValueError comes from the parser of the value (value_parsers.py)."""

    path: KeyPath
    reason: KeyProblem | WrongType | NotAChoice | ValueError


T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
S = TypeVar("S", bound="Section")


class ValueType(msgspec.Struct, Generic[T], frozen=True):
    """Reads a value of one type."""

    def read(self, value: object, path: KeyPath, problems: list[ValueProblem]) -> T | None:
        """Returns the value, which stands at ``path``. If it is wrong, adds all that is wrong to ``problems``, and the
        result must not be used."""
        raise NotImplementedError

    @property
    def schema(self) -> JsonSchema:
        """The JSON Schema. A section or an enumeration is a reference to its definition."""
        raise NotImplementedError

    @property
    def definition(self) -> type[Section | StrEnum] | None:
        """The section or the enumeration that the type refers to, itself or for its members."""
        return None


def _report_wrong_type(value: object, expected: str, path: KeyPath, problems: list[ValueProblem]) -> None:
    """Adds the problem that ``value`` is of another type. The problem of an unusable value is reported already."""
    if value is not UNUSABLE:
        problems.append(ValueProblem(path, WrongType(expected)))


class Scalar(ValueType[T], frozen=True):
    """A single value. ``parse`` turns its text into the value, or raises ValueError."""

    parse: Callable[[str], T]
    schema: JsonSchema
    expected: str = SINGLE_VALUE

    def read(self, value: object, path: KeyPath, problems: list[ValueProblem]) -> T | None:
        if not isinstance(value, str):
            _report_wrong_type(value, self.expected, path, problems)
            return None
        try:
            return self.parse(value)
        except ValueError as error:
            problems.append(ValueProblem(path, error))
            return None


def text(parse: Callable[[str], T], **schema_keywords: Any) -> Scalar[T]:
    """A text that ``parse`` accepts. ``schema_keywords`` are further keywords of its JSON Schema."""
    return Scalar(parse, {"type": "string", **schema_keywords})


def integer(minimum: int, maximum: int) -> Scalar[int]:
    """A whole number from ``minimum`` to ``maximum``."""
    return Scalar(
        lambda text: value_parsers.check_range(value_parsers.parse_integer(text), minimum, maximum, str),
        {"type": "integer", "minimum": minimum, "maximum": maximum},
        WHOLE_NUMBER,
    )


def duration(minimum: float, maximum: float) -> Scalar[float]:
    """A text such as ``500ms``, read as seconds, from ``minimum`` to ``maximum`` seconds."""

    def parse_seconds(text: str) -> float:
        seconds = value_parsers.parse_duration(text)
        return value_parsers.check_range(seconds, minimum, maximum, value_parsers.format_duration)

    schema = {"type": "string", "pattern": value_parsers.DURATION_PATTERN, "examples": ["5s"]}
    return Scalar(parse_seconds, schema, NUMBER)


class Choice(ValueType[E], frozen=True):
    """One of the values of ``enumeration``."""

    enumeration: type[E]

    def read(self, value: object, path: KeyPath, problems: list[ValueProblem]) -> E | None:
        if not isinstance(value, str):
            _report_wrong_type(value, SINGLE_VALUE, path, problems)
            return None
        try:
            return self.enumeration(value)
        except ValueError:
            problems.append(ValueProblem(path, NotAChoice([str(choice) for choice in self.enumeration])))
            return None

    @property
    def schema(self) -> JsonSchema:
        return reference_to(self.enumeration)

    @property
    def definition(self) -> type[StrEnum]:
        return self.enumeration


class ListOf(ValueType[tuple[T, ...]], frozen=True):
    """A list. ``split`` turns a single text in the place of the list into its members; ``None``: it must be a list.
    ``check_members`` raises ValueError if the members do not fit together."""

    member: ValueType[T]
    schema: JsonSchema
    split: Callable[[str], tuple[str, ...]] | None = lambda text: (text,)
    check_members: Callable[[tuple[T, ...]], object] = lambda _: None

    def read(self, value: object, path: KeyPath, problems: list[ValueProblem]) -> tuple[T, ...] | None:
        count_before = len(problems)
        try:
            if isinstance(value, str) and self.split is not None:
                value = list(self.split(value))
            if not isinstance(value, list):
                _report_wrong_type(value, LIST, path, problems)
                return None
            members = tuple(self.member.read(member, (*path, index), problems) for index, member in enumerate(value))
            members = cast("tuple[T, ...]", members)
            if len(problems) == count_before:
                self.check_members(members)
        except ValueError as error:
            problems.append(ValueProblem(path, error))
            return None
        return members

    @property
    def definition(self) -> type[Section | StrEnum] | None:
        return self.member.definition


class MappingOf(ValueType[dict[str, T]], frozen=True):
    """A mapping whose keys the user chooses."""

    key: Scalar[str]
    value: ValueType[T]

    def read(self, value: object, path: KeyPath, problems: list[ValueProblem]) -> dict[str, T] | None:
        if not isinstance(value, dict):
            _report_wrong_type(value, KEYS_WITH_VALUES, path, problems)
            return None
        entries = {}
        for key, member in value.items():
            self.key.read(key, (*path, key), problems)
            entries[key] = self.value.read(member, (*path, key), problems)
        return cast("dict[str, T]", entries)

    @property
    def schema(self) -> JsonSchema:
        pattern = self.key.schema.get("pattern")
        if pattern is not None:
            return {"type": "object", "patternProperties": {pattern: self.value.schema}}
        return {"type": "object", "additionalProperties": self.value.schema}

    @property
    def definition(self) -> type[Section | StrEnum] | None:
        return self.value.definition


class Nullable(ValueType[T | None], frozen=True):
    """A value, or nothing."""

    value: ValueType[T]

    def read(self, value: object, path: KeyPath, problems: list[ValueProblem]) -> T | None:
        return None if value is None else self.value.read(value, path, problems)

    @property
    def schema(self) -> JsonSchema:
        return or_null(self.value.schema)

    @property
    def definition(self) -> type[Section | StrEnum] | None:
        return self.value.definition


# -- sections --------------------------------------------------------------------------------------------------------


class Setting(msgspec.Struct, frozen=True):
    """A key of a section. Only a key that is not required may have no value."""

    value_type: ValueType[Any]
    description: str | None
    is_required: bool


def required(value_type: ValueType[T], description: str | None = None) -> T:
    """A key that must be given. The description goes into the JSON Schema."""
    return cast(T, Setting(value_type, description, is_required=True))


def optional(value_type: ValueType[T], description: str | None = None) -> T | None:
    """A key that may be left out or have no value. Then it is ``None`` in the section."""
    return cast("T | None", Setting(value_type, description, is_required=False))


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(required,))
class Section:
    """A mapping with known keys; each other key is an error. In a subclass, ``required`` and ``optional`` make the
    keys. An object of it has the value of each key.

    Not a dataclass: Python would take a tenth of the time of a short command to make so many.
    """

    settings: ClassVar[Mapping[str, Setting]] = {}  # by their keys

    def __init_subclass__(cls) -> None:
        own_settings = {key: value for key, value in vars(cls).items() if isinstance(value, Setting)}
        cls.settings = {**cls.settings, **own_settings}
        for key in own_settings:
            delattr(cls, key)  # only objects have the values

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(dict.fromkeys(self.settings), **values)

    def replace(self: S, **values: Any) -> S:
        """Returns a copy with other values under some keys."""
        return type(self)(**{**vars(self), **values})


class SectionOf(ValueType[S], frozen=True):
    section: type[S]

    def read(self, value: object, path: KeyPath, problems: list[ValueProblem]) -> S | None:
        if not isinstance(value, dict):
            _report_wrong_type(value, KEYS_WITH_VALUES, path, problems)
            return None
        settings = self.section.settings
        count_before = len(problems)
        values: dict[str, Any] = {}
        for key, setting in settings.items():
            if key not in value:
                if setting.is_required:
                    problems.append(ValueProblem((*path, key), KeyProblem.MISSING))
            elif value[key] is not None or setting.is_required:
                values[key] = setting.value_type.read(value[key], (*path, key), problems)
        problems += [ValueProblem((*path, key), KeyProblem.UNKNOWN) for key in value if key not in settings]
        return self.section(**values) if len(problems) == count_before else None

    @property
    def schema(self) -> JsonSchema:
        return reference_to(self.section)

    @property
    def definition(self) -> type[Section]:
        return self.section


class SectionOrText(SectionOf[S], frozen=True):
    """A section, or a text in its place, which stands for the section with this text under ``key`` alone."""

    key: str

    def read(self, value: object, path: KeyPath, problems: list[ValueProblem]) -> S | None:
        return super().read({self.key: value} if isinstance(value, str) else value, path, problems)

    @property
    def schema(self) -> JsonSchema:
        return {"anyOf": [self.section.settings[self.key].value_type.schema, reference_to(self.section)]}


def list_of_sections(section: type[S]) -> ListOf[S]:
    member = SectionOf(section)
    return ListOf(member, {"type": "array", "items": member.schema}, split=None)


def reference_to(definition: type[Section | StrEnum]) -> JsonSchema:
    """Returns the JSON Schema that refers to the definition of a section or an enumeration."""
    return {"$ref": f"#/$defs/{definition.__name__}"}


def or_null(schema: JsonSchema) -> JsonSchema:
    """Returns the JSON Schema for a value of ``schema``, or null."""
    return {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}]}
