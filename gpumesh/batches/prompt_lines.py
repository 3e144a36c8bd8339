"""A prompt as a JSON line: the lines of `gpumesh run -f` and of batches with ``PROMPT_ENDPOINT``. Pure.

The error for a line names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from gpumesh.backends.base import Message
from gpumesh.errors import UsageError

PROMPT_KEYS = ("prompt", "messages", "model", "system", "options", "node")


@dataclass(frozen=True, slots=True)
class PromptEntry:
    """One prompt of a file. The results repeat ``text``. The other fields override what is said for the whole file."""

    text: str
    messages: tuple[Message, ...] = ()
    model: str | None = None
    system: str | None = None
    node: str | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def read_prompt_line(line: str, location: str) -> PromptEntry:
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
    except ValueError as error:  # a number of more digits than Python reads
        raise UsageError(f"{location}: a number is too long") from error


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
