"""Quotes names from outside for a shell, for a command that a person pastes, and for YAML: one function for each.

Such names come from hosts (models), from clients (the model that they want), and from another person's mesh.yaml (users
and paths). A name may contain ``$(…)``, a quote, a line break or ``${VAR}``. Code that puts a name into a command, a
completion or a file uses a function of this module, and no rule of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

MAX_PASTED_LENGTH = 300  # characters

_PLAIN = re.compile(r"[A-Za-z0-9._:/@+-]+")  # a word that needs no quotes in any shell
# In fish a backslash inside single quotes escapes a backslash or a quote after it, also the closing quote. In a POSIX
# shell it escapes nothing.
_FISH_ESCAPE = re.compile(r"\\(?:[\\']|$)")
_SHELL_RUNS = re.compile(r"\\+|'+|[^\\']+")  # a run of backslashes, a run of quotes, or a run of other characters
_POWERSHELL_QUOTES = re.compile("['\u2018\u2019\u201a\u201b]")  # PowerShell reads typographic quotes as quotes too
# Characters that JSON allows and YAML does not: controls, line breaks of other scripts, non-characters.
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def is_plain(word: str) -> bool:
    """Whether every shell reads ``word`` as itself in every position, and no program reads it as an option."""
    return _PLAIN.fullmatch(word) is not None and not word.startswith("-")


def shell_word(text: str) -> str:
    """Returns ``text`` quoted as one word of a command line, the same for POSIX shells, zsh and fish.

    ``shlex.quote`` is not enough: it does not quote ``=ls``, which zsh expands, and it does not know fish.
    """
    if _PLAIN.fullmatch(text):
        return text
    if _FISH_ESCAPE.search(text) is None:  # then fish reads single quotes as a POSIX shell does
        return "'" + text.replace("'", "'\"'\"'") + "'"  # a quote stands in double quotes, between two quoted parts
    return "".join(map(_quote_run, _SHELL_RUNS.findall(text)))


def shell_words(words: Iterable[str]) -> str:
    """Returns a command line of these words, each quoted by ``shell_word``."""
    return " ".join(map(shell_word, words))


def _quote_run(run: str) -> str:
    """Quotes one run of ``_SHELL_RUNS`` in the way that fish and a POSIX shell read alike."""
    first_character = run[0]
    if first_character == "\\":
        return f'"{run * 2}"'  # inside double quotes, two backslashes are one
    if first_character == "'":
        return f'"{run}"'
    return f"'{run}'"


def powershell_word(text: str) -> str:
    """Returns ``text`` quoted as one word for PowerShell: in single quotes, with every quote in it doubled."""
    return f"'{_POWERSHELL_QUOTES.sub(lambda match: match[0] * 2, text)}'"


def paste_command(template: str, **values: str) -> str:
    """Returns a command for a person to paste, between backticks: ``paste_command("gpumesh trust {NODE}", NODE=name)``.

    Each value becomes one word. If a value is not safe to paste, its name stays in the command (``gpumesh trust
    NODE``), and a remark after the command says so.
    """
    names_left_out = [name for name, value in values.items() if not _may_be_pasted(value)]
    words = {name: name if name in names_left_out else shell_word(value) for name, value in values.items()}
    command = f"`{template.format(**words)}`"
    if names_left_out:
        command += f" ({' and '.join(names_left_out)} left out: not safe to paste)"
    return command


def _may_be_pasted(value: str) -> bool:
    """Whether a person may paste the value: it is not empty, is short enough to read, has no invisible characters, and
    does not look like an option."""
    return 0 < len(value) <= MAX_PASTED_LENGTH and value.isprintable() and not value.startswith("-")


def yaml_text(text: str) -> str:
    """Returns ``text`` between double quotes, as a value for mesh.yaml. The result is valid JSON too.

    The reader of mesh.yaml gives back exactly ``text``, without expanding a variable in it. There is one exception:
    surrogates, which no file can hold, become U+FFFD.
    """
    escaped = _SURROGATES.sub("\ufffd", text).replace("${", "$${")
    return _NOT_IN_YAML.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(escaped, ensure_ascii=False))
