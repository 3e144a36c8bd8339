"""Reads the input of `run`: a file of prompts (a line each, or JSON objects), and model options (`-o key=value`). Pure.

Each problem of a file is reported with its line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from gpumesh.backends.base import Message
from gpumesh.daemon.sessions.session import PromptRequest
from gpumesh.errors import UsageError

PROMPT_KEYS = ("prompt", "messages", "model", "system", "options", "node")


@dataclass(frozen=True, slots=True)
class PromptEntry:
    """One prompt of a file. The result repeats ``text``. The other fields override the options of the command line."""

    text: str
    messages: tuple[Message, ...] = ()
    model: str | None = None
    system: str | None = None
    node: str | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def make_request(self, common: PromptRequest, system: str | None) -> PromptRequest:
        """This prompt as a request. ``common`` and ``system`` fill in the fields that the prompt does not set."""
        messages = self.messages or (Message("user", self.text),)
        system = self.system if self.system is not None else system
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
    """The prompts of a file. A file is JSON lines if its name says so or its first line is a JSON object. In any other
    file each line that is not blank is a prompt. Raises UsageError."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UsageError(f"{name} has no prompts", hint="one prompt a line, or JSON lines with a key `prompt`")
    if not name.endswith((".jsonl", ".ndjson")) and not _is_json_object(lines[0][1]):
        return [PromptEntry(line.rstrip("\r")) for _, line in lines]
    return [_read_entry(line, f"{name}:{number}") for number, line in lines]


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_entry(line: str, location: str) -> PromptEntry:
    entry = _parse_line(line, location)
    if isinstance(entry, str):
        return PromptEntry(entry)
    if not isinstance(entry, dict):
        raise UsageError(f"{location}: expected an object with a key `prompt`, or a string")
    unknown = [key for key in entry if key not in PROMPT_KEYS]
    if unknown:
        raise UsageError(f"{location}: unknown key {unknown[0]!r}", hint=f"the keys are: {', '.join(PROMPT_KEYS)}")
    for key in ("prompt", "model", "system", "node"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise UsageError(f"{location}: {key} is not a string")
    options = entry.get("options") or {}
    if not isinstance(options, dict):
        raise UsageError(f"{location}: options is not an object")
    messages = _read_messages(entry.get("messages"), location)
    has_prompt = entry.get("prompt") is not None
    if has_prompt == bool(messages):  # both, or neither
        raise UsageError(f"{location}: needs either prompt or messages")
    text = entry["prompt"] if not messages else messages[-1].content
    return PromptEntry(text, messages, entry.get("model"), entry.get("system"), entry.get("node"), options)


def _parse_line(line: str, location: str) -> Any:
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
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise UsageError(f"{location}: messages is not a list")
    messages = []
    for entry in value:
        if not isinstance(entry, dict) or not {"role", "content"} <= entry.keys() <= {"role", "content", "images"}:
            raise UsageError(f"{location}: a message is an object with role and content")
        images = entry.get("images") or []
        if not isinstance(images, list):
            raise UsageError(f"{location}: images is not a list")
        if not all(isinstance(value, str) for value in (entry["role"], entry["content"], *images)):
            raise UsageError(f"{location}: role, content and images of a message are strings")
        messages.append(Message(entry["role"], entry["content"], tuple(images)))
    return tuple(messages)


def read_options(pairs: list[str]) -> dict[str, Any]:
    """The values of ``-o``: ``temperature=0.2``, ``stop=["###"]``. A value that is no JSON is text. Raises
    UsageError."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"-o {pair!r} is not key=value", hint="for example -o temperature=0.2 -o num_predict=100")
        try:
            options[key.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            options[key.strip()] = value
    return options
