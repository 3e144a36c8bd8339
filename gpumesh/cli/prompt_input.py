"""Reads the input of `run`: a file of prompts (plain lines or JSON lines), and model options (`-o key=value`). Pure.

The error for a file names the line that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from gpumesh.batches.prompt_lines import PromptEntry, read_prompt_line
from gpumesh.errors import UsageError


def read_prompts(text: str, *, name: str) -> list[PromptEntry]:
    """The prompts in a file's ``text``. A file has JSON lines if its ``name`` ends with ``.jsonl`` or ``.ndjson``, or
    if its first line that is not blank is a JSON object. In any other file each line that is not blank is a prompt.
    Raises UsageError for a line that is wrong, and if there is no prompt."""
    prompts = [read() for read in prompt_readers(text.split("\n"), name=name)]
    if not prompts:
        raise no_prompts_error(name)
    return prompts


def prompt_readers(lines: Iterable[str], *, name: str) -> Iterator[Callable[[], PromptEntry]]:
    """Yields a function for each prompt in the lines of a file, as ``read_prompts`` describes the file. The function
    returns the prompt, and raises UsageError if the line is wrong. So a caller that skips a prompt does not parse its
    line, and a caller that goes on after a wrong line finds the next one."""
    has_json_lines: bool | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if has_json_lines is None:
            has_json_lines = name.endswith((".jsonl", ".ndjson")) or _is_json_object(line)
        if has_json_lines:
            yield partial(read_prompt_line, line, f"{name}:{number}")
        else:
            yield partial(PromptEntry, line.rstrip("\r"))


def no_prompts_error(name: str) -> UsageError:
    """The error for a file of blank lines."""
    return UsageError(f"{name} has no prompts", hint="one prompt a line, or JSON lines with a key `prompt`")


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):  # no JSON; RecursionError: nested too deep
        return False


def read_options(pairs: list[str]) -> dict[str, Any]:
    """The values of ``-o`` by key: ``temperature=0.2``, ``stop=["###"]``. A value that is no JSON is text. Raises
    UsageError for a text without a key or without ``=``."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals_sign, value = pair.partition("=")
        key = key.strip()
        if not equals_sign or not key:
            raise UsageError(f"-o {pair!r} is not key=value", hint="for example -o temperature=0.2 -o num_predict=100")
        try:
            options[key] = json.loads(value)
        except (ValueError, RecursionError):  # no JSON, so it is text
            options[key] = value
    return options
