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

# By name: the module in gpumesh.cli.commands, then one line of help. In the order of the overview (`gpumesh --help`).
COMMANDS: Mapping[str, tuple[str, str]] = {
    "up": ("up", "Open the tunnels, start the gateway, and watch over both."),
    "down": ("down", "Drain and stop the background mesh."),
    "status": ("status", "Every node and GPU, with its health and the reason for it."),
    "run": ("run", "Send a prompt, or a file of them, through the balancer."),
    "bench": ("bench", "Measure latency and throughput, per node and for the mesh."),
    "audit": ("audit", "What mesh.yaml expects against what is found, and why they differ."),
    "init": ("init", "Write a mesh.yaml after looking at what is there."),
    "node": ("node", "Add, remove and change nodes while the mesh runs."),
    "config": ("config", "Check or show the configuration; its JSON Schema."),
    "trust": ("trust", "Show a host key's fingerprint and record it."),
    "describe": ("describe", "All that is known of a node."),
    "models": ("models", "The fleet's models: list, pull, rm, load, unload, sync."),
    "drain": ("drain", "Give a node no new work."),
    "resume": ("resume", "Give a drained node work again."),
    "reconnect": ("reconnect", "Try a node's tunnel again now."),
    "reload": ("reload", "Let the running mesh take over a changed mesh.yaml."),
    "ui": ("ui", "Open the gateway's page in a browser."),
    "env": ("env", "Print the variables that point other programs at the mesh."),
    "exec": ("exec", "Run a command on a node's host, on several, or on all."),
    "ssh": ("ssh", "Log in to a node's host, or run a command there on a terminal."),
    "logs": ("logs", "The background mesh's log."),
    "notify": ("notify", "Send a test message by each rule of `notify` in mesh.yaml."),
    "explain": ("explain", "What a finding or an error code means, and what to do."),
    "doctor": ("doctor", "One report to paste: versions, paths, configuration, last errors."),
    "completion": ("completion", "Print the completion script of a shell."),
    "version": ("version", "The version of gpumesh."),
    "help": ("help", "How a command is used."),
    "demo": ("demo", "A whole mesh of simulated GPU hosts on this machine."),
}


class _LazyCommands(MutableMapping[str, Any]):
    """The commands by name. The module of a command is imported when the command is first looked up."""

    def __init__(self) -> None:
        self._imported: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The command, which is imported and prepared now if this is the first time. Raises KeyError for an unknown
        name."""
        if name not in self._imported:
            module_name, _ = COMMANDS[name]
            command = build_command(importlib.import_module(f"gpumesh.cli.commands.{module_name}").app)
            command.name = name
            self._imported[name] = _prepare_command(command)
        return self._imported[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._imported[name] = command

    def __delitem__(self, name: str) -> None:
        del self._imported[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class LazyGroup(TyperGroup):
    """Lists its commands without importing them."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**{**attrs, "commands": None})  # no commands of Typer's own: _LazyCommands has them all
        self.commands = _LazyCommands()

    def list_commands(self, _ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        del ctx  # the overview is the same everywhere
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])


def _use_plain_name(parameter: Any) -> None:
    """Gives an argument the name ``NODE...`` in the usage line, as in ssh and kubectl, not ``{NODE}...``, and hides its
    type. Does nothing to an option, and nothing if this version of Typer lacks ``_usage_display_name``: that method is
    private to Typer."""
    is_argument = parameter.param_type_name == "argument"
    if not is_argument or not hasattr(parameter, "_usage_display_name"):
        return
    name = parameter.display_name_raw
    # Some names have the brackets or the dots already: their ``metavar`` was written so.
    if not parameter.required and not name.startswith("["):
        name = f"[{name}]"
    takes_several_words = parameter.nargs != 1
    if takes_several_words and not name.endswith("..."):
        name += "..."
    parameter._usage_display_name = lambda: name
    parameter.display_type_rich = lambda **_: None


def _prepare_command(command: Any) -> Any:
    """The same command, with plain names in its usage line, and with the options of `gpumesh` itself, which may follow
    the command's name (`gpumesh status -c mesh.yaml`). Prepares its subcommands too."""
    subcommands = getattr(command, "commands", {})
    for subcommand in subcommands.values():
        _prepare_command(subcommand)
    for parameter in command.params:
        _use_plain_name(parameter)
    if not subcommands:  # otherwise each subcommand has these options
        _add_global_options(command)
    return defer_parameters(command)


def _add_global_options(command: Any) -> None:
    """Adds ``--config``, ``--quiet`` and ``--verbose`` to a command. If the command has an option of its own with one
    of their names, this name stays with the command: in `bench run`, ``-c`` is ``--concurrency``."""
    from gpumesh.cli.global_options import repeat_global_options

    own_names = {name for parameter in command.params for name in parameter.opts}
    for option in repeat_global_options():
        option.opts = [name for name in option.opts if name not in own_names]
        if option.opts:
            command.params.append(option)


def new_app(**settings: Any) -> typer.Typer:
    """The app of one command. Its help is plain: rich's help would double the start-up time."""
    return typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False, **settings)
