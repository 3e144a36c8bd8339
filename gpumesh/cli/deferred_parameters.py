"""Makes Typer prepare its reader of a parameter only when the parameter is given: that shortens the start-up time.

Typer makes pydantic's machinery for each parameter, given or not. That takes 70 ms, a quarter of the time that `status`
may take. A parameter that is not given does not need it, and plain text does not need it either.
"""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Any

_PLAIN_NUMBERS = {int: re.compile(r"[0-9]{1,9}"), float: re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")}


class _DeferredParameter:
    """Stands in for Typer's own reader of a parameter. That reader is made only when a value needs it."""

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """Converts the value of a parameter. Values that need no conversion are returned without Typer's reader.

        Typer calls this method on its own reader, so its name and its parameters are Typer's."""
        if value is None:  # the parameter is not given
            takes_several = param.multiple or param.nargs == -1
            return () if takes_several else None
        if value == param.default:
            return value
        annotation = param.type_descriptor.annotation
        if annotation == list[str]:
            return list(value)
        if isinstance(value, str):
            if annotation is Path and param.name == "config":  # the command itself says why it cannot read its file
                return Path(value)
            converted = _convert_plain_text(value, annotation, param.type_descriptor.parameter_info)
            if converted is not None:
                return converted
        self._parameter._runtime_param = None  # Typer's own reader is made by the next call
        return self._parameter.get_runtime_param().coerce(value, param=param, ctx=ctx)


def _convert_plain_text(text: str, annotation: Any, bounds: Any) -> Any:
    """Returns the value of a text in its usual form, such as ``8`` for a number. Returns ``None`` for any other text:
    Typer's reader has to say what is wrong with it. ``bounds`` has the ``min`` and ``max`` of a number."""
    if annotation is str:
        return text
    if annotation is Path:
        is_unreadable = os.path.exists(text) and not os.access(text, os.R_OK)
        return None if is_unreadable else Path(text)
    if annotation in _PLAIN_NUMBERS:
        if not _PLAIN_NUMBERS[annotation].fullmatch(text):
            return None
        number = annotation(text)
        is_low = bounds.min is not None and number < bounds.min
        is_high = bounds.max is not None and number > bounds.max
        return None if is_low or is_high else number
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return next((choice for choice in annotation if choice == text), None)
    return None


def defer_parameters(command: Any) -> Any:
    """The same command, without the cost of parameters that are not given. The option `--help` is deferred later, as
    Typer makes this option only when it parses a command line."""
    for parameter in command.params:
        _defer(parameter)
    make_help_option = command.get_help_option
    command.get_help_option = lambda ctx: _defer(make_help_option(ctx))
    return command


def _defer(parameter: Any) -> Any:
    """Gives the parameter a _DeferredParameter as its reader, unless Typer has made a reader for it already. Returns
    the same parameter."""
    # ``None``: Typer has not made its reader yet. Older versions of Typer lack the attribute, and do not need the
    # deferral.
    own_reader = getattr(parameter, "_runtime_param", "no such attribute")
    if own_reader is None:
        parameter._runtime_param = _DeferredParameter(parameter)
    return parameter
