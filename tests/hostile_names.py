"""Names that an attacker would give a model, a host or a user; and a check with real shells that a text is safe to
paste."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.prerequisites import needs, program

RAN = "ran"  # the file that each of these names would make if a shell ran it
NAMES = (
    "zed\\$(touch ran)",
    "zed$(touch ran)",
    "zed`touch ran`",
    "zed;touch ran",
    "zed\ntouch ran\n",
    "zed|touch ran",
    "zed&touch ran&",
    "zed'$(touch ran)'",
    'zed"$(touch ran)"',
    "zed\\'\"; touch ran #",
    "zed\\",
    "zed\\\\'\\",
    "zed x",
    "zed'x",
    "zed${HOME}",
    "zed*",
    "~root",
    "=ls",
    "!!",
    "-rf",
    "--config=x",
    "\x1b]0;zed\x07",
    "\x1b[2Jzed",
    "zed\u202exyz",
    "zed\u2028touch ran",
    "zed`; touch ran; `",
    "$${GPUMESH_API_KEY}",
    "${GPUMESH_API_KEY}",
    "a: b",
    "] }",
    "zed # no comment",
    "zé日",
    "-",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:/.-_ "
_SIGNS = "`$(){}[];&|<>'\"\\!*?~=#%:,-@ \n\t\r\x00\x1b\x9b\x7f\x85\u2028\u202e\ufeffé日\U0001f642abHOME"
ANY_NAME = st.one_of(st.sampled_from(NAMES), st.text(alphabet=_SIGNS, min_size=1, max_size=12))
_KINDS = ("sh", "bash", "zsh", "fish")
SHELLS = [pytest.param(name, marks=needs(name)) for name in _KINDS]  # to parametrize with
_AVAILABLE = tuple(name for name in _KINDS if program(name))


def split_with_shell(shell: str, line: str, folder: Path) -> list[str]:
    """The words that a shell makes of a line. Fails if the shell runs anything of it."""
    script = f"printf '%s\\0' {line}"
    result = subprocess.run([shell, "-c", script], cwd=folder, capture_output=True, timeout=60, check=False)
    assert result.returncode == 0, f"{shell}: {line!r}: {result.stderr!r}"
    assert list(folder.iterdir()) == [], f"{shell} has run something of {line!r}"
    return result.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]


def find_commands(text: str) -> list[str]:
    """The texts between backticks, for names that have no backticks themselves."""
    return re.findall(r"`([^`]*)`", text)


def check_safe_to_paste(text: str, name: str, folder: Path) -> None:
    """Fails if a command in ``text`` does more than name ``name``, or if a terminal would act on ``text``."""
    assert text.isprintable(), repr(text)
    if "`" in name:
        return  # here nothing tells our backticks from those of the name; test_quoting.py covers such names
    for line in find_commands(text):
        if not set(line) & set(name) - set(_LETTERS) and "zed" not in line:
            continue  # a command without the name
        for shell in _AVAILABLE:
            words = split_with_shell(shell, line, folder)
            assert all(name in word for word in words if "zed" in word), words
