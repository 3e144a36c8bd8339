"""Turns frozen records into JSON values and back, by their fields: the status document, the control socket.

A record is an object of a dataclass, or of a ``msgspec.Struct`` (which is made several times as fast).

This module knows no particular class but ``MeshState``.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from pathlib import PurePath
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from gpumesh.state import STATUS_SCHEMA, MeshState
from gpumesh.text.printable import printable

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Turns a tree of records, enums, datetimes, paths and collections into values that ``json.dumps`` accepts. NaN
    and infinity become ``None``, because JSON cannot express them. A value of any other type is returned as it is."""
    value_type = type(value)  # the exact types come first: they are the most frequent, and need no slow isinstance
    if value is None or value_type is str or value_type is int or value_type is bool:
        return value
    if value_type is float:
        return value if math.isfinite(value) else None
    if value_type is tuple or value_type is list:
        return [to_json(item) for item in value]
    if _is_record_type(value_type):
        return {name: to_json(getattr(value, name)) for name in _field_names(value_type)}  # type: ignore[arg-type]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):  # of a subclass, such as a NamedTuple
        return [to_json(item) for item in value]
    return value


def _is_record_type(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, msgspec.Struct))


@cache
def _field_names(record_type: Any) -> tuple[str, ...]:
    if dataclasses.is_dataclass(record_type):
        return tuple(field.name for field in dataclasses.fields(record_type))
    names: tuple[str, ...] = record_type.__struct_fields__
    return names


def status_json(state: MeshState) -> dict[str, Any]:
    """Returns the document ``gpumesh.status/1`` of this state (docs/status-json.md)."""
    return {"schema": STATUS_SCHEMA, **to_json(state)}


def status_from_json(document: Mapping[str, Any]) -> MeshState:
    """Returns the state of a document ``gpumesh.status/1``. Raises ``ValueError`` for any other document."""
    if document.get("schema") != STATUS_SCHEMA:
        raise ValueError(f"not a {STATUS_SCHEMA} document: schema is {printable(repr(document.get('schema')), 80)}")
    return from_json(MeshState, document)


def from_json(kind: type[T], value: Any) -> T:
    """Builds an object of the class ``kind`` from the result of ``to_json``. Ignores unknown keys, so that a newer
    version can add keys. A missing key gives its field's default.

    Raises ``ValueError`` where a value is not of its field's type, or where a field without a default has no key.
    """
    try:
        result: T = _read(kind, value)
    except ValueError as error:  # the error's text repeats the value, which may have megabytes
        raise ValueError(printable(str(error), 300)) from error
    return result


@cache
def _field_types(record_type: type) -> dict[str, Any]:
    return get_type_hints(record_type)


def _read(expected: Any, value: Any) -> Any:
    """Returns the JSON ``value`` as the type ``expected``: a class, or a generic such as ``str | None`` or
    ``tuple[int, ...]``. Raises ``ValueError`` when the value does not fit. Any value fits ``Any``, and a generic that
    has no branch below."""
    if expected is Any:
        return value
    origin = get_origin(expected)
    if origin in (Union, types.UnionType):
        return _read_union(get_args(expected), value)
    if origin is tuple:
        return _read_tuple(get_args(expected), value)
    if origin is Mapping:
        return _read_mapping(get_args(expected), value)
    if _is_record_type(expected):
        return _read_record(expected, value)
    if isinstance(expected, type) and issubclass(expected, Enum):
        return expected(value)
    if isinstance(expected, type) and issubclass(expected, (datetime, PurePath)):
        text = _read(str, value)
        return _read_datetime(text) if issubclass(expected, datetime) else expected(text)
    if expected is float and _has_json_type(value, int):  # in JSON, 1 and 1.0 are the same number
        try:
            return float(value)
        except OverflowError as error:  # an integer of more than 308 digits
            raise ValueError("a number beyond all bounds") from error
    if isinstance(expected, type) and not _has_json_type(value, expected):
        raise ValueError(f"expected {expected.__name__}, got {value!r}")
    return value


def _has_json_type(value: Any, expected: type) -> bool:
    """Like ``isinstance``, but a bool is no int: in Python it is one, in JSON it is not."""
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, expected)


def _read_union(members: tuple[Any, ...], value: Any) -> Any:
    """Returns the value as the first type of the union (``bool | str``) that fits. Raises the ``ValueError`` of the
    last type if no type fits. Null always gives ``None``: every union of our fields has ``None``."""
    if value is None:
        return None
    *others, last = [member for member in members if member is not type(None)]
    for member in others:
        try:
            return _read(member, value)
        except ValueError:
            continue
    return _read(last, value)


def _read_tuple(members: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    """Returns the JSON list as a tuple. ``members`` are the arguments of the tuple's type: ``(int, ...)`` for
    ``tuple[int, ...]``, ``(str, int)`` for ``tuple[str, int]``."""
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {value!r}")  # noqa: TRY004  # ``from_json`` promises ValueError
    if members[1:] == (Ellipsis,):
        item_type = members[0]
        return tuple(_read(item_type, item) for item in value)
    # ``strict``: a list of another length raises ValueError.
    return tuple(_read(item_type, item) for item_type, item in zip(members, value, strict=True))


def _read_mapping(members: tuple[Any, ...], value: Any) -> Mapping[str, Any]:
    """Returns the JSON object as a mapping. ``members`` are the arguments of the mapping's type: ``(str, Priority)``.
    Keys are always texts."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected an object, got {value!r}")  # noqa: TRY004  # ``from_json`` promises ValueError
    _key_type, item_type = members
    return {key: _read(item_type, item) for key, item in value.items()}


def _read_record(record_type: Any, value: Any) -> Any:
    """Builds the record from a JSON object. A missing key gives its field's default. Raises ``ValueError``, also for
    a missing key whose field has no default."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected an object, got {value!r}")  # noqa: TRY004  # ``from_json`` promises ValueError
    field_types = _field_types(record_type)
    fields = {name: _read(field_types[name], value[name]) for name in _field_names(record_type) if name in value}
    try:
        return record_type(**fields)
    except TypeError as error:  # a required field is missing
        raise ValueError(str(error)) from error


def _read_datetime(text: str) -> datetime:
    """Returns the time of an ISO 8601 text. A text without a zone means UTC, so that all times can be compared."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
