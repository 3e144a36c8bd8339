"""Makes Typer prepare its reader of a parameter only when the parameter is given: that shortens the start-up time.

Typer makes pydantic's machinery for each parameter, given or not. That takes 70 ms, a quarter of the time that `status`
may take. A parameter that is not given does not need it, and plain text does not need it either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
        is_text, annotation = isinstance(value, str), param.type_descriptor.annotation
        if value == param.default:
            return value
        if is_text and annotation is str:
            return value
        if is_text and annotation is Path and param.name == "config":  # given with most commands, so it must be quick
            return Path(value)
        self._parameter._runtime_param = None  # Typer's own reader is made by the next call
        return self._parameter.get_runtime_param().coerce(value, param=param, ctx=ctx)


def defer_parameters(command: Any) -> Any:
    """The same command, without the cost of parameters that are not given. The option `--help` is deferred later, as
    Typer makes this option only when it parses a command line."""
    for parameter in command.params:
        _defer(parameter)
    make_help_option = command.get_help_option
    command.get_help_option = lambda ctx: _defer(make_help_option(ctx))
    return command


def _defer(parameter: Any) -> Any:
    """The same parameter, which has a _DeferredParameter now unless Typer has made its own reader already."""
    # ``None``: Typer has not made its reader yet. Older versions of Typer have no such attribute, and no such cost.
    own_reader = getattr(parameter, "_runtime_param", "no such attribute")
    if own_reader is None:
        parameter._runtime_param = _DeferredParameter(parameter)
    return parameter
