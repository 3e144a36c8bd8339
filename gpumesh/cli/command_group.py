"""The list of all commands, and the Typer group that imports a command when it is used.

A new command needs a row in ``COMMANDS``, and a file in ``commands/`` whose ``app`` is made by ``new_app``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
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
    "chat": ("chat", "Talk to a model at the terminal."),
    "batch": ("batch", "Many requests of a file: submit, list, show, results, retry, cancel, rm."),
    "bench": ("bench", "Measure latency and throughput, per node and for the mesh."),
    "audit": ("audit", "What mesh.yaml expects against what is found, and why they differ."),
    "init": ("init", "Write a mesh.yaml after looking at what is there."),
    "node": ("node", "Add, remove and change nodes while the mesh runs."),
    "config": ("config", "Check or show the configuration; its JSON Schema."),
    "trust": ("trust", "Show a host key's fingerprint and record it."),
    "describe": ("describe", "All that is known of a node."),
    "models": ("models", "The fleet's models: list, pull, rm, load, unload, sync."),
    "pool": ("pool", "One model over several nodes: plan, up, down, status."),
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
    "service": ("service", "Make the mesh a service: started at boot, and again after a crash."),
    "usage": ("usage", "Who used what: requests, tokens, GPU time, energy."),
    "explain": ("explain", "What a finding or an error code means, and what to do."),
    "doctor": ("doctor", "A report to paste: versions, paths, configuration, errors."),
    "completion": ("completion", "Print the completion script of a shell."),
    "version": ("version", "The version of gpumesh."),
    "help": ("help", "How a command is used."),
    "demo": ("demo", "A whole mesh of simulated GPU hosts on this machine."),
}


# Other spellings of two options of `gpumesh` itself. -v alone: as in ollama and docker; before a command it says more.
_OTHER_SPELLINGS: Mapping[str, str] = {
    **dict.fromkeys(("-v", "-V", "-version"), "--version"),
    **dict.fromkeys(("-help", "-?", "/?", "--h"), "--help"),
}
# The kinds of things that kubectl names before the name of a node (`describe node iceland`, `logs pod/iceland`).
_KIND_PREFIXES = ("no", "host", "po", "all")


class _LazyCommands(MutableMapping[str, Any]):
    """The commands by name. The module of a command is imported when the command is first looked up."""

    def __init__(self) -> None:
        self._imported: dict[str, Any] = {}  # by name

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

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if len(args) == 1:
            args = [_OTHER_SPELLINGS.get(args[0], args[0])]
        return _parse_or_answer(super().parse_args, ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        names_kind = len(args) > 1 and args[1].startswith(_KIND_PREFIXES)
        if args[0] not in COMMANDS or names_kind:  # otherwise nothing of this is imported
            args = _answer_guess(args, ctx, ())
        return super().resolve_command(ctx, args)

    def list_commands(self, _ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        del ctx  # the overview is the same everywhere
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])


def _answer_guess(args: list[str], ctx: Any, path: tuple[str, ...]) -> list[str]:
    """The words that are meant by ``args``, the words that the group of commands at ``path`` has got. Raises UsageError
    for a guess that a sentence answers; not while the shell completes words."""
    from gpumesh.cli.first_guesses import answers

    known = list(ctx.command.commands)
    words = answers.translate(args, ctx, known=known, path=path)
    if words[0] not in known and not ctx.resilient_parsing:
        answers.answer_word(words, ctx, path=path)
    return words


def _parse_or_answer(parse_args: Callable[[Any, list[str]], Any], ctx: Any, args: list[str]) -> list[str]:
    """What ``parse_args``, Typer's own, returns. Raises UsageError for an unknown option that a sentence answers."""
    words = list(args)  # Typer's parser empties the list
    try:
        return list(parse_args(ctx, args))
    except Exception as error:
        # NoSuchOption, whose class is private to Typer. All others are raised again.
        option = getattr(error, "option_name", None)
        if type(error).__name__ != "NoSuchOption" or not isinstance(option, str):
            raise
        from gpumesh.cli.first_guesses import answers

        if answers.asks_for_help(words):
            return list(parse_args(ctx, ["--help"]))
        answers.answer_option(ctx.command_path.split()[1:], option)
        raise


def _answer_guesses(command: Any) -> None:
    """Lets a command answer guesses at its options, and a group of commands also guesses at its commands."""
    parse_args = command.parse_args
    command.parse_args = lambda ctx, args: _parse_or_answer(parse_args, ctx, args)
    if hasattr(command, "commands"):
        resolve_command = command.resolve_command
        command.resolve_command = lambda ctx, args: resolve_command(
            ctx, args if args[0] in command.commands else _answer_guess(args, ctx, (command.name,))
        )


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
    _answer_guesses(command)
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
