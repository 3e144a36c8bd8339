"""Quotes names from outside for a shell, for a command that a person pastes, and for YAML: one function for each.

Hosts name models, clients name the model they want, and somebody else's mesh.yaml names users and paths. Such a name
may contain ``$(…)``, a quote, a line break or ``${VAR}``. Code that puts a name into a command, a completion or a file
uses a function from here, and no rule of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

MAX_PASTED_LENGTH = 300  # characters

_PLAIN = re.compile(r"[A-Za-z0-9._:/@+-]+")
# In fish a backslash inside single quotes escapes a backslash or a quote after it. In a POSIX shell it escapes nothing.
_FISH_ESCAPE = re.compile(r"\\(?:[\\']|$)")
_SHELL_RUNS = re.compile(r"\\+|'+|[^\\']+")  # of backslashes, of quotes, of other characters
_POWERSHELL_QUOTES = re.compile("['\u2018\u2019\u201a\u201b]")  # PowerShell reads typographic quotes as quotes too
# Characters that JSON allows and YAML does not: controls, line breaks of other scripts, non-characters.
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def is_plain(word: str) -> bool:
    """Whether every shell reads ``word`` as itself in every position, and no program reads it as an option."""
    return _PLAIN.fullmatch(word) is not None and not word.startswith("-")


def shell_word(text: str) -> str:
    """``text`` as one word of a command line, for POSIX shells, zsh and fish alike.

    ``shlex.quote`` is not enough: it does not quote ``=ls``, which zsh expands, and it does not know fish.
    """
    if _PLAIN.fullmatch(text):
        return text
    if _FISH_ESCAPE.search(text) is None:
        return "'" + text.replace("'", "'\"'\"'") + "'"
    return "".join(map(_quote_run, _SHELL_RUNS.findall(text)))


def shell_words(words: Iterable[str]) -> str:
    return " ".join(map(shell_word, words))


def _quote_run(run: str) -> str:
    match run[0]:
        case "\\":
            return f'"{run * 2}"'
        case "'":
            return f'"{run}"'
        case _:
            return f"'{run}'"


def powershell_word(text: str) -> str:
    return f"'{_POWERSHELL_QUOTES.sub(lambda match: match[0] * 2, text)}'"


def paste_command(template: str, **values: str) -> str:
    """A command for a person to paste, between backticks: ``paste_command("gpumesh trust {NODE}", NODE=name)``.

    Each value becomes one word. A value is left out if it is empty, has invisible characters, would be read as an
    option, or is too long for a person to read. Then its name stays in the template, and the text says why.
    """
    left_out = [name for name, value in values.items() if not _may_be_pasted(value)]
    quoted = {name: name if name in left_out else shell_word(value) for name, value in values.items()}
    line = f"`{template.format(**quoted)}`"
    if left_out:
        line += f" ({' and '.join(left_out)} left out: not safe to paste)"
    return line


def _may_be_pasted(value: str) -> bool:
    return 0 < len(value) <= MAX_PASTED_LENGTH and value.isprintable() and not value.startswith("-")


def yaml_text(text: str) -> str:
    """``text`` between double quotes. The reader of mesh.yaml gives back exactly ``text`` and expands no variable in
    it; only surrogates become U+FFFD. The result is valid JSON too."""
    escaped = _SURROGATES.sub("\ufffd", text).replace("${", "$${")
    return _NOT_IN_YAML.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(escaped, ensure_ascii=False))
