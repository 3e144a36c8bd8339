"""Frozen dataclasses to JSON and back, by their fields. This module knows no particular class but ``MeshState``."""

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

from gpumesh.printable import printable
from gpumesh.state import STATUS_SCHEMA, MeshState

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """A tree of dataclasses, enums, datetimes and tuples as values that ``json.dumps`` accepts. NaN and infinity become
    ``None``, because JSON cannot express them."""
    kind = type(value)
    if value is None or kind is str or kind is int or kind is bool:
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if kind is tuple or kind is list:
        return [to_json(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: to_json(getattr(value, name)) for name in _field_names(kind)}  # type: ignore[arg-type]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


@cache
def _field_names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def status_json(state: MeshState) -> dict[str, Any]:
    """The document ``gpumesh.status/1`` (docs/status-json.md)."""
    return {"schema": STATUS_SCHEMA, **to_json(state)}


def status_from_json(document: Mapping[str, Any]) -> MeshState:
    """Raises ``ValueError`` when the document is not ``gpumesh.status/1``."""
    if document.get("schema") != STATUS_SCHEMA:
        raise ValueError(f"not a {STATUS_SCHEMA} document: schema is {printable(repr(document.get('schema')), 80)}")
    return from_json(MeshState, document)


def from_json(kind: type[T], value: Any) -> T:
    """Builds ``kind`` from the result of ``to_json``. Unknown keys are ignored: adding keys is compatible.

    Raises ``ValueError`` where a value is not of its field's type or a required field is missing.
    """
    try:
        result: T = _read(kind, value)
    except ValueError as error:  # its text repeats the value, which may have megabytes
        raise ValueError(printable(str(error), 300)) from error
    return result


@cache
def _field_types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, value: Any) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        inner = [argument for argument in get_args(kind) if argument is not type(None)]
        for argument in inner[:-1]:  # of several types (bool | str) the first that fits
            try:
                return _read(argument, value)
            except ValueError:
                continue
        return _read(inner[-1], value)
    if origin is tuple:
        arguments = get_args(kind)
        if not isinstance(value, list):
            raise ValueError(f"expected a list, got {value!r}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_read(arguments[0], item) for item in value)
        return tuple(_read(argument, item) for argument, item in zip(arguments, value, strict=True))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"expected an object, got {value!r}")
        types_of = _field_types(kind)  # type: ignore[arg-type]
        known = {
            field.name: _read(types_of[field.name], value[field.name])
            for field in dataclasses.fields(kind)
            if field.name in value
        }
        try:
            return kind(**known)  # type: ignore[operator]
        except TypeError as error:
            raise ValueError(str(error)) from error
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if isinstance(kind, type) and issubclass(kind, (datetime, PurePath)):
        text = _read(str, value)
        return _read_datetime(text) if issubclass(kind, datetime) else kind(text)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError("a number beyond all bounds") from error
    if isinstance(kind, type) and (not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))):
        raise ValueError(f"expected {kind.__name__}, got {value!r}")
    return value


def _read_datetime(text: str) -> datetime:
    """A text without a zone means UTC, so that all times can be compared."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
