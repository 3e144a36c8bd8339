"""The list of all commands, and the Typer group that imports a command when it is used.

A new command needs a row in ``COMMANDS``, and a file in ``commands/`` whose ``app`` is made by ``new_app``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command as build_command

from gpumesh.cli.deferred_parameters import defer_parameters

# name -> (module in gpumesh.cli.commands, one line of help), in the order of the overview.
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


class _LazyCommands(MutableMapping[str, Any]):
    """The commands by name. Each is imported when it is first looked up."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            module, _ = COMMANDS[name]
            command = build_command(importlib.import_module(f"gpumesh.cli.commands.{module}").app)
            command.name = name
            self._built[name] = _prepare_command(command)
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
    """Lists its commands without importing them."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**{**attrs, "commands": None})
        self.commands = _LazyCommands()

    def list_commands(self, _ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        del ctx  # the overview is the same everywhere
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _use_plain_name(argument: Any) -> None:
    """Writes ``NODE...`` in the usage line, as ssh and kubectl do, not ``{NODE}...``, and leaves out the type."""
    if argument.param_type_name != "argument" or not hasattr(argument, "_usage_display_name"):
        return
    name = argument.display_name_raw
    if not argument.required and not name.startswith("["):
        name = f"[{name}]"
    if argument.nargs != 1 and not name.endswith("..."):
        name += "..."
    argument._usage_display_name = lambda: name
    argument.display_type_rich = lambda **_: None


def _prepare_command(command: Any) -> Any:
    """Gives a command and its subcommands plain names in the usage line, and lets the options of `gpumesh` itself
    follow the command's name (`gpumesh status -c mesh.yaml`). A command's own option keeps a name that both have."""
    from gpumesh.cli.global_options import repeat_global_options

    for subcommand in getattr(command, "commands", {}).values():
        _prepare_command(subcommand)
    for parameter in command.params:
        _use_plain_name(parameter)
    if not getattr(command, "commands", None):
        own_names = {name for parameter in command.params for name in parameter.opts}
        for option in repeat_global_options():
            option.opts = [name for name in option.opts if name not in own_names]
            if option.opts:
                command.params.append(option)
    return defer_parameters(command)


def new_app(**settings: Any) -> typer.Typer:
    """The app of one command. Its help is plain: rich's help would double the start-up time."""
    return typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False, **settings)
