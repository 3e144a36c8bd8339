"""Text of others that a shell, a person's clipboard or a YAML reader will take in: one function for each.

A host names its models, a client names the one that it wants, and the mesh.yaml of a stranger names users and paths.
Such a name may hold ``$(…)``, a quote, a line break or ``${VAR}``. Code that puts one into a command, a completion or a
file takes the function from here, so that no place has a rule of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

LONGEST_PASTED = 300  # characters

_PLAIN = re.compile(r"[A-Za-z0-9._:/@+-]+")
# In fish a backslash inside single quotes takes the sign of these two behind it; in a POSIX shell it takes none.
_FISH_ESCAPE = re.compile(r"\\(?:[\\']|$)")
_RUNS = re.compile(r"\\+|'+|[^\\']+")
_POWERSHELL_QUOTES = re.compile("['\u2018\u2019\u201a\u201b]")  # it takes typographic ones for the same
# What JSON leaves as it is and YAML does not: controls, line breaks of other scripts, what may not stand in a file.
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def is_plain(word: str) -> bool:
    """Whether every shell takes ``word`` for itself wherever it stands, and no program takes it for an option."""
    return _PLAIN.fullmatch(word) is not None and not word.startswith("-")


def shell_word(text: str) -> str:
    """``text`` as one word of a command line, for POSIX shells, zsh and fish alike.

    ``shlex.quote`` would not do: it leaves ``=ls`` as it is, which zsh expands, and knows nothing of fish.
    """
    if _PLAIN.fullmatch(text):
        return text
    if _FISH_ESCAPE.search(text) is None:
        return "'" + text.replace("'", "'\"'\"'") + "'"
    return "".join(map(_quoted_run, _RUNS.findall(text)))


def shell_words(words: Iterable[str]) -> str:
    return " ".join(map(shell_word, words))


def _quoted_run(run: str) -> str:
    match run[0]:
        case "\\":
            return f'"{run * 2}"'
        case "'":
            return f'"{run}"'
        case _:
            return f"'{run}'"


def powershell_word(text: str) -> str:
    return f"'{_POWERSHELL_QUOTES.sub(lambda quote: quote[0] * 2, text)}'"


def paste_command(template: str, **values: str) -> str:
    """A command for a person to paste, between backticks: ``paste_command("gpumesh trust {NODE}", NODE=name)``.

    Each value becomes one word. One that must not be pasted at all (it cannot be seen as it is, or a program would take
    it for an option, or nobody would read it to its end) is left out: its place keeps the name that it has in the
    template, and the text says why.
    """
    left_out = [place for place, value in values.items() if not _may_be_pasted(value)]
    words = {place: place if place in left_out else shell_word(value) for place, value in values.items()}
    line = f"`{template.format(**words)}`"
    if left_out:
        line += f" ({' and '.join(left_out)} left out: not safe to paste)"
    return line


def _may_be_pasted(value: str) -> bool:
    return 0 < len(value) <= LONGEST_PASTED and value.isprintable() and not value.startswith("-")


def yaml_text(text: str) -> str:
    """``text`` between double quotes, so that mesh.yaml is read as exactly that: no variable in it is expanded. Valid
    as JSON too."""
    whole = _SURROGATES.sub("\ufffd", text).replace("${", "$${")
    return _NOT_IN_YAML.sub(lambda sign: f"\\u{ord(sign[0]):04x}", json.dumps(whole, ensure_ascii=False))
