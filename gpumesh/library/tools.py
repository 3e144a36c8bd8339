"""Reads the tools of a request: Python functions, or their description as JSON schema."""

from __future__ import annotations

import enum
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

Tool: TypeAlias = Callable[..., Any] | Mapping[str, Any]
"""A function with type hints, or ``{"type": "function", "function": {"name": …, "parameters": …}}``."""

_TYPES: Mapping[object, str] = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object"}


def read_tools(tools: object) -> list[dict[str, Any]]:
    """The tools as JSON schema. Raises TypeError and ValueError, which say what was expected."""
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise TypeError(f"tools are a list of functions or of JSON schemas, not {type(tools).__name__}")
    return [_read_tool(tool) for tool in tools]


def _read_tool(tool: object) -> dict[str, Any]:
    """A tool as a JSON schema: given as such, or made from a function. Raises TypeError and ValueError."""
    if isinstance(tool, Mapping):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not (name and isinstance(name, str)):
            raise ValueError('a tool is {"type": "function", "function": {"name": …, "parameters": …}}')
        return {"type": "function", **tool}
    if callable(tool):
        return describe_function(tool)
    raise TypeError(f"a tool is a function or a JSON schema, not {type(tool).__name__}")


def describe_function(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function, by its type hints. The first paragraph of its docstring is the description."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):  # a hint names what cannot be found at this moment
        hints = {}
    properties: dict[str, Any] = {}
    required = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"the tool {name} takes *args or **kwargs; a model must know each argument by name")
        properties[parameter.name] = _schema_of(hints.get(parameter.name, str))
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    description = (inspect.getdoc(function) or "").split("\n\n", maxsplit=1)[0].replace("\n", " ")
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _schema_of(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint; any value for a hint that JSON schema has no word for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        schemas = [_schema_of(argument) for argument in arguments if argument is not type(None)]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is typing.Annotated:
        descriptions = [text for text in arguments[1:] if isinstance(text, str)]
        return {**_schema_of(arguments[0]), **({"description": descriptions[0]} if descriptions else {})}
    kind = origin or hint
    if kind in (list, tuple, set, frozenset, Sequence, Iterable):
        return {"type": "array", **({"items": _schema_of(arguments[0])} if arguments else {})}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [member.value for member in kind]}
    return {"type": _TYPES[kind]} if kind in _TYPES else {}
