"""A Typer group whose commands are imported when they are used, with the help for the overview in a table."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command as build_command

# name -> (module below gpumesh.cli.commands, one line of help), in the order of the overview.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "up": ("up", "Open the tunnels, start the gateway, and watch over both."),
    "down": ("down", "Drain and stop the background mesh."),
    "status": ("status", "Every node and GPU, with its health and the reason for it."),
    "run": ("run", "Send a prompt, or a file of them, through the balancer."),
    "bench": ("bench", "Measure latency and throughput, per node and for the mesh."),
    "audit": ("audit", "What mesh.yaml expects against what is found, and why they differ."),
    "init": ("init", "Write a mesh.yaml after looking at what is there."),
    "config": ("config", "Check or show the configuration; its JSON Schema."),
    "trust": ("trust", "Show a host key's fingerprint and record it."),
    "models": ("models", "The fleet's models: list, pull, rm, load, unload, sync."),
    "drain": ("drain", "Give a node no new work."),
    "resume": ("resume", "Give a drained node work again."),
    "reconnect": ("reconnect", "Try a node's tunnel again now."),
    "env": ("env", "Print the variables that point other programs at the mesh."),
    "exec": ("exec", "Run a command on a node's host, or on all of them."),
    "logs": ("logs", "The background mesh's log."),
    "explain": ("explain", "What a finding or an error code means, and what to do."),
    "demo": ("demo", "A whole mesh of simulated GPU hosts on this machine."),
}

AnyCommand = TyperCommand | TyperGroup


class _Lazy(MutableMapping[str, Any]):
    """The group's commands: their names are known, each is imported when it is first asked for."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            module, _ = COMMANDS[name]
            command = build_command(importlib.import_module(f"gpumesh.cli.commands.{module}").app)
            command.name = name
            self._built[name] = _with_globals(command)
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class LazyGroup(TyperGroup):
    """Lists its commands without importing any of them."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**{**attrs, "commands": None})
        self.commands = _Lazy()

    def list_commands(self, _ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        del ctx  # the table needs none
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


class _WhenGiven:
    """Reads a parameter's value. Typer makes pydantic's machinery for each parameter, given or not: 70 ms, a quarter of
    what `status` may take. One that was not given, and plain text, need none of it."""

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        if value is None:
            return () if param.multiple or param.nargs == -1 else None
        annotation = param.type_descriptor.annotation
        if value == param.default or (isinstance(value, str) and annotation is str):
            return value
        if isinstance(value, str) and annotation is Path and param.name == "config":
            return Path(value)
        self._parameter._runtime_param = None  # Typer's own, made at the next call
        return self._parameter.get_runtime_param().coerce(value, param=param, ctx=ctx)


def defer_parameters(command: Any) -> Any:
    """The command, without the cost of parameters that are not given; the one for help is made when it is parsed."""
    for parameter in command.params:
        _quick(parameter)
    made = command.get_help_option
    command.get_help_option = lambda ctx: _quick(made(ctx))
    return command


def _quick(parameter: Any) -> Any:
    if getattr(parameter, "_runtime_param", False) is None:  # a Typer that has this; older ones are quick anyway
        parameter._runtime_param = _WhenGiven(parameter)
    return parameter


def _plain_name(argument: Any) -> None:
    """``NODE...`` in the usage line, as ssh and kubectl have it, not ``{NODE}...``; and no type beside it."""
    if argument.param_type_name != "argument" or not hasattr(argument, "_usage_display_name"):
        return
    name = argument.display_name_raw
    if not argument.required and not name.startswith("["):
        name = f"[{name}]"
    if argument.nargs != 1 and not name.endswith("..."):
        name += "..."
    argument._usage_display_name = lambda: name
    argument.display_type_rich = lambda **_: None


def _with_globals(command: Any) -> Any:
    """The options of `gpumesh` itself may also stand behind the command's name: `gpumesh status -c mesh.yaml`."""
    from gpumesh.cli.context import repeat_global_options

    for sub in getattr(command, "commands", {}).values():
        _with_globals(sub)
    for parameter in command.params:
        _plain_name(parameter)
    if not getattr(command, "commands", None):
        taken = {name for parameter in command.params for name in parameter.opts}
        for option in repeat_global_options():
            option.opts = [name for name in option.opts if name not in taken]
            if option.opts:
                command.params.append(option)
    return defer_parameters(command)


def new_app(**settings: Any) -> typer.Typer:
    """A command's own app. Plain help: rich's would cost as much time again as all the rest."""
    return typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False, **settings)
