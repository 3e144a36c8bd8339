"""Decides what a guess means: the words of a command of ours, or a sentence that names the command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpumesh.cli.first_guesses.options import OPTION_POINTERS
from gpumesh.cli.first_guesses.words import ALIASES, POINTERS
from gpumesh.errors import UsageError
from gpumesh.text.quoting import paste_command

# The kinds of things that kubectl and docker name before a thing's own name, and the command that lists them here.
_NODE_KINDS = ("node", "nodes", "no", "host", "hosts", "pod", "pods", "po")
_KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*_NODE_KINDS, "all", "gpu", "gpus", "service", "services", "svc"), ("status",)),
    **dict.fromkeys(("model", "models", "image", "images"), ("models", "list")),
    **dict.fromkeys(("pool", "pools"), ("pool", "status")),
    **dict.fromkeys(("event", "events", "ev", "logs"), ("logs",)),
    **dict.fromkeys(("config", "cm", "configmap", "configmaps"), ("config", "show")),
}
# docker's and kubectl's groups of commands, which we do not have: the word after them is the command.
_NODE_GROUPS = ("compose", "container", "stack", "docker", "pod")
_GROUPS = (*_NODE_GROUPS, "image", "kubectl", "ollama")
_ALL_OPTIONS = ("-a", "-A", "--all", "--all-namespaces")  # a list of ours has all of them anyway
_HELP_SPELLINGS = ("-help", "-?", "/?", "--h")


def translate(words: Sequence[str], ctx: Any, *, known: Sequence[str], path: tuple[str, ...]) -> list[str]:
    """The words that are meant: those of a command of ours where there is one, else the words unchanged.

    ``path`` is the group of commands that got the words, ``ctx`` the group's context, and ``known`` are the commands of
    the group. Only of `gpumesh` itself, whose path is empty, known commands are translated too."""
    first_word, *rest = words
    if path:
        alias = ALIASES.get(path, {}).get(first_word)
        return list(words) if alias is None else [*alias, *rest]
    if first_word in known:
        return [first_word, *_drop_kind(first_word, rest, ctx)]
    if first_word == "get" and rest:
        return _translate_get(rest) or list(words)
    if first_word in _GROUPS and rest:
        lists_nodes = first_word in _NODE_GROUPS and rest[0] in ("ls", "list")
        return translate(["ps", *rest[1:]] if lists_nodes else rest, ctx, known=known, path=path)
    looks_like_model = any(":" in word for word in rest)
    if first_word in ("stop", "kill") and looks_like_model:  # `ollama stop MODEL`
        return ["models", "unload", *rest]
    if first_word in ("rm", "delete", "remove") and looks_like_model:
        return ["models", "rm", *rest]
    if not rest and first_word in ("stop", "start"):
        return ["down"] if first_word == "stop" else ["up", "-d"]
    alias = ALIASES[()].get(first_word)
    if alias is None:
        return list(words)
    if alias[0] == "status":
        rest = [word for word in rest if word not in _ALL_OPTIONS]
    return [*alias, *_drop_kind(alias[0], rest, ctx)]


def _translate_get(rest: Sequence[str]) -> list[str] | None:
    """The words for `get KIND …`; ``None`` for an unknown kind."""
    kind, slash, name = rest[0].partition("/")
    command = _KINDS.get(kind)
    if command is None:
        return None
    names = [name] if slash else []
    return [*command, *names, *(word for word in rest[1:] if word not in _ALL_OPTIONS)]


def _drop_kind(command: str, rest: Sequence[str], ctx: Any) -> list[str]:
    """The words after ``command`` without a kind before the name of a node: ``node iceland``, ``node/iceland``. The
    word stays if a node of mesh.yaml is called so: many a pod is called ``pod``."""
    from gpumesh.cli.completion import complete_nodes

    words = list(rest)
    if command not in ("describe", "drain", "resume", "logs", "status", "ssh", "exec", "reconnect"):
        return words
    kind, slash, name = words[0].partition("/") if words else ("", "", "")
    if kind not in _NODE_KINDS and (command, kind) != ("status", "all"):
        return words
    if slash:
        return [name, *words[1:]]
    name_follows = len(words) > 1 and not words[1].startswith("-")
    lists_nodes = command == "status"  # `top nodes`
    if not (name_follows or lists_nodes) or kind in complete_nodes(ctx, kind):
        return words
    return words[1:]


def answer_word(words: Sequence[str], ctx: Any, *, path: tuple[str, ...]) -> None:
    """Raises UsageError with a sentence that names the command that is meant, if the first word is such a guess.
    ``words`` is what ``translate`` has left unchanged."""
    word = words[0]
    sentence = POINTERS.get(path, {}).get(word)
    if sentence is None and not path:
        sentence = _recognize(word, ctx)
    if sentence is not None:
        command = " ".join(("gpumesh", *path, word if len(word) <= 40 else "…"))
        raise UsageError(f"there is no command {command!r}", hint=sentence)


def _recognize(word: str, ctx: Any) -> str | None:
    """The sentence for a word that is no command, but the name of something: a prompt, an address, a finding, a model
    or a node. ``None`` for any other word."""
    from gpumesh.audit.catalog import CATALOG
    from gpumesh.cli.completion import complete_nodes

    if word.startswith("ssh ") or ("@" in word and " " not in word):
        return "`gpumesh node add 'ssh USER@HOST -p PORT'` adds a host, `gpumesh init --from 'ssh …'` begins with it"
    if " " in word.strip():
        return 'a prompt is sent by `gpumesh run "PROMPT"`'
    if word in CATALOG:
        return paste_command("gpumesh explain {CODE}", CODE=word) + " tells what it means"
    if word in complete_nodes(ctx, word):
        shown = [paste_command(f"gpumesh {command} {{NODE}}", NODE=word) for command in ("describe", "status", "ssh")]
        return f"{shown[0]} and {shown[1]} show this node, {shown[2]} logs in"
    if ":" in word:
        return paste_command("gpumesh run {MODEL} PROMPT", MODEL=word) + " sends a prompt to a model"
    return None


def answer_option(path: Sequence[str], option: str) -> None:
    """Raises UsageError with a sentence that names what is meant, if this option of the command at ``path`` is such a
    guess."""
    command = " ".join(path)
    sentence = OPTION_POINTERS.get((command, option)) or OPTION_POINTERS.get((command, "*"))
    if sentence is not None:
        raise UsageError(f"{' '.join(('gpumesh', *path))} has no option {option}", hint=sentence)


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether one of these words, before a ``--``, is another spelling of ``--help``."""
    own_words = words[: words.index("--")] if "--" in words else words
    return any(word in _HELP_SPELLINGS for word in own_words)
