"""Reads the input of `run`: a file of prompts (plain lines or JSON lines), and model options (`-o key=value`). Pure.

The error for a file names the line that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from gpumesh.backends.base import Message
from gpumesh.daemon.sessions.session import PromptRequest
from gpumesh.errors import UsageError

PROMPT_KEYS = ("prompt", "messages", "model", "system", "options", "node")


@dataclass(frozen=True, slots=True)
class PromptEntry:
    """One prompt of a file. The output of `run` repeats ``text``. The other fields override the options of the command
    line."""

    text: str
    messages: tuple[Message, ...] = ()
    model: str | None = None
    system: str | None = None
    node: str | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def make_request(self, common: PromptRequest, system: str | None) -> PromptRequest:
        """This prompt as a request. ``common`` and ``system``, the system prompt, come from the command line and fill
        in the fields that the file does not set."""
        messages = self.messages or (Message("user", self.text),)
        if self.system is not None:
            system = self.system
        if system is not None:
            messages = (Message("system", system), *messages)
        return replace(
            common,
            messages=messages,
            model=self.model or common.model,
            node=self.node or common.node,
            options={**common.options, **self.options},
        )


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
            yield partial(_read_entry, line, f"{name}:{number}")
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


def _read_entry(line: str, location: str) -> PromptEntry:
    """The prompt of a JSON line: a string, or an object with some of ``PROMPT_KEYS``. ``location``: file and line, for
    the UsageError that a wrong line raises."""
    entry = _parse_line(line, location)
    if isinstance(entry, str):
        return PromptEntry(entry)
    if not isinstance(entry, dict):
        raise UsageError(f"{location}: expected an object with a key `prompt`, or a string")
    for key in entry:
        if key not in PROMPT_KEYS:
            raise UsageError(f"{location}: unknown key {key!r}", hint=f"the keys are: {', '.join(PROMPT_KEYS)}")
    for key in ("prompt", "model", "system", "node"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise UsageError(f"{location}: {key} is not a string")
    options = entry.get("options") or {}
    if not isinstance(options, dict):
        raise UsageError(f"{location}: options is not an object")
    messages = _read_messages(entry.get("messages"), location)
    has_prompt, has_messages = entry.get("prompt") is not None, bool(messages)
    if has_prompt == has_messages:  # both, or neither
        raise UsageError(f"{location}: needs either prompt or messages")
    text = messages[-1].content if has_messages else entry["prompt"]
    return PromptEntry(text, messages, entry.get("model"), entry.get("system"), entry.get("node"), options)


def _parse_line(line: str, location: str) -> Any:
    """The JSON value of a line. Raises UsageError with the column where the JSON breaks."""
    try:
        return json.loads(line)
    except RecursionError as error:
        raise UsageError(f"{location}: not JSON: nested too deeply") from error
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{location}:{error.colno}: not JSON: {error.msg}",
            hint="all lines of this file are read as JSON; one that is only a prompt has to stand in double quotes",
        ) from error


def _read_messages(value: Any, location: str) -> tuple[Message, ...]:
    """The messages of a chat; empty if the line has none. Raises UsageError for a value of another form."""
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise UsageError(f"{location}: messages is not a list")
    return tuple(_read_message(entry, location) for entry in value)


def _read_message(entry: Any, location: str) -> Message:
    """One message: ``role`` and ``content``, and ``images`` in base64 if it has some. Raises UsageError for a value of
    another form."""
    needed_keys, known_keys = {"role", "content"}, {"role", "content", "images"}
    if not isinstance(entry, dict) or not needed_keys <= entry.keys() <= known_keys:
        raise UsageError(f"{location}: a message is an object with role and content")
    images = entry.get("images") or []
    if not isinstance(images, list):
        raise UsageError(f"{location}: images is not a list")
    if not all(isinstance(text, str) for text in (entry["role"], entry["content"], *images)):
        raise UsageError(f"{location}: role, content and images of a message are strings")
    return Message(entry["role"], entry["content"], tuple(images))


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
