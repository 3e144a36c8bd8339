"""``Message`` and ``ToolCall``, and the reading of messages as programs write them: text, dictionaries, objects."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, TypeAlias

from gpumesh.library.images import Image, encode_image

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for: the function's name and its arguments. ``id`` is set by some servers."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat. ``role`` is ``system``, ``user``, ``assistant`` or ``tool``.

    ``tool_calls`` are those of an earlier answer. A message with the role ``tool`` has the result of a call in
    ``content``, and the function's name in ``tool_name``."""

    role: str
    content: str = ""
    images: Sequence[Image] = ()
    tool_calls: Sequence[ToolCall] = ()
    tool_name: str | None = None
    tool_call_id: str | None = None
    thinking: str | None = None


Messages: TypeAlias = str | Message | Mapping[str, Any] | Iterable[Message | Mapping[str, Any]]
"""A text of the user, one message, or several, each as a ``Message`` or as a dictionary."""

_KEYS = ("role", "content", "images", "tool_calls", "tool_name", "tool_call_id", "thinking", "name")
_EXPECTED = 'a text, a gpumesh.Message, or a dictionary such as {"role": "user", "content": "hi"}'


def read_messages(messages: object) -> tuple[Message, ...]:
    """The messages in one form, with their images as base64. Raises TypeError and ValueError, which say which message
    is wrong, and what was expected."""
    if isinstance(messages, str):
        return (Message("user", messages),)
    if isinstance(messages, Mapping) or hasattr(messages, "role"):
        return (_read_message(messages, "the message"),)
    if isinstance(messages, bytes) or not isinstance(messages, Iterable):
        raise TypeError(f"messages are {_EXPECTED}, or a list of them, not {type(messages).__name__}")
    read = tuple(_read_message(message, f"messages[{number}]") for number, message in enumerate(messages))
    if not read:
        raise ValueError("messages are empty; a chat needs one at least")
    return read


def _read_message(message: object, place: str) -> Message:
    """Reads a message in any form that the library takes. ``place`` names it in errors. Raises TypeError and
    ValueError."""
    if isinstance(message, Mapping):
        parsed = _from_mapping(message, place)
    elif isinstance(message, Message):
        parsed = message
    elif hasattr(message, "model_dump"):  # the message of an ollama or openai answer
        parsed = _from_mapping(message.model_dump(exclude_none=True), place, is_foreign=True)
    elif hasattr(message, "role") and hasattr(message, "content"):
        parsed = Message(message.role, message.content, tuple(getattr(message, "images", ())))
    else:
        raise TypeError(f"{place} is {_EXPECTED}, not {type(message).__name__}")
    if parsed.role not in ROLES:
        raise ValueError(f"{place} has the role {parsed.role!r}; a role is one of {', '.join(ROLES)}")
    if not isinstance(parsed.content, str):
        raise TypeError(f"{place} has content of type {type(parsed.content).__name__}; content is text")
    images = parsed.images
    if isinstance(images, str | bytes) or not isinstance(images, Iterable):
        raise TypeError(f"the images of {place} are a list, not {type(images).__name__}")
    return replace(parsed, images=tuple(map(encode_image, images)), tool_calls=tuple(parsed.tool_calls))


def _from_mapping(message: Mapping[str, Any], place: str, *, is_foreign: bool = False) -> Message:
    """``is_foreign``: another library made it, whose other keys mean nothing here."""
    unknown = [] if is_foreign else [key for key in message if key not in _KEYS]
    if unknown:
        similar = get_close_matches(str(unknown[0]), _KEYS, n=1)
        hint = f"did you mean {similar[0]!r}?" if similar else f"the keys are {', '.join(_KEYS)}"
        raise ValueError(f"{place} has the key {unknown[0]!r}; {hint}")
    if "role" not in message:
        raise ValueError(f"{place} has no role; expected was {_EXPECTED}")
    calls = _read_tool_calls(message.get("tool_calls") or (), place)
    content, images = message.get("content"), message.get("images") or ()
    if content is None and not calls:
        raise ValueError(f"{place} has no content; expected was {_EXPECTED}")
    if isinstance(content, list):
        content, more_images = _read_parts(content, place)
        images = (*images, *more_images)
    return Message(
        message["role"],
        "" if content is None else content,
        images,
        calls,
        tool_name=message.get("tool_name") or message.get("name"),
        tool_call_id=message.get("tool_call_id"),
        thinking=message.get("thinking"),
    )


def _read_parts(parts: Sequence[object], place: str) -> tuple[str, tuple[Image, ...]]:
    """OpenAI's form of content: a list of parts, each a text or an image. An image must be in the message itself."""
    texts: list[str] = []
    images: list[Image] = []
    for part in parts:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image_url", "image_url": {"url": str(url)}} if url.startswith("data:"):
                images.append(url)
            case {"type": "image_url"}:
                raise ValueError(f"an image of {place} is no data: URL; nothing is fetched from elsewhere")
            case _:
                raise ValueError(f"the content of {place} has a part that is neither a text nor an image_url")
    return "\n".join(texts), tuple(images)


def _read_tool_calls(calls: object, place: str) -> tuple[ToolCall, ...]:
    """Tool calls as ToolCall, or as ollama and openai write them."""
    if isinstance(calls, str | Mapping) or not isinstance(calls, Iterable):
        raise TypeError(f"the tool_calls of {place} are a list, not {type(calls).__name__}")
    read = []
    for call in calls:
        tool_call = call if isinstance(call, ToolCall) else read_tool_call(call)
        if tool_call is None:
            raise ValueError(
                f'{place} has a tool call that is neither a gpumesh.ToolCall nor {{"function": {{"name": …}}}}'
            )
        read.append(tool_call)
    return tuple(read)


def read_tool_call(call: object) -> ToolCall | None:
    """A tool call of an answer, in Ollama's or OpenAI's form (there the arguments are JSON in a text); ``None`` if it
    is none."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return None
    name, arguments, call_id = function.get("name"), function.get("arguments"), call.get("id")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        arguments = {}
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        return None
    return ToolCall(name, MappingProxyType(dict(arguments)), call_id if isinstance(call_id, str) else None)
