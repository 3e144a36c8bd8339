"""What an attacker would call a model, a host or a user; and a shell that tells whether a text is safe to paste."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.parts import needs, program

RAN = "ran"  # the file that each of them would make
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
    """The words that a shell makes of a line, and nothing else may come of it."""
    script = f"printf '%s\\0' {line}"
    result = subprocess.run([shell, "-c", script], cwd=folder, capture_output=True, timeout=60, check=False)
    assert result.returncode == 0, f"{shell}: {line!r}: {result.stderr!r}"
    assert list(folder.iterdir()) == [], f"{shell} has run something of {line!r}"
    return result.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]


def find_commands(text: str) -> list[str]:
    """What stands between backticks, where the names themselves have none."""
    return re.findall(r"`([^`]*)`", text)


def check_safe_to_paste(text: str, name: str, folder: Path) -> None:
    """Fails where a command in ``text`` would do more than name ``name``, or where a terminal would act on it."""
    assert text.isprintable(), repr(text)
    if "`" in name:
        return  # which of the backticks are ours cannot be told here: see the tests of ``quoting``
    for line in find_commands(text):
        if not set(line) & set(name) - set(_LETTERS) and "zed" not in line:
            continue  # a command of ours without it
        for shell in _AVAILABLE:
            made = split_with_shell(shell, line, folder)
            assert all(name in word for word in made if "zed" in word), made
