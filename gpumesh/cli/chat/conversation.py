"""``Conversation``: the messages of a chat and its settings, and their form in a file. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpumesh.backends.base import Message
from gpumesh.daemon.sessions.session import PromptRequest
from gpumesh.errors import UsageError

SCHEMA = "gpumesh.chat/1"
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(slots=True)
class Conversation:
    """``node`` is the only node that may answer; ``None`` is any node. ``options`` have Ollama's names. ``think`` is
    as in a PromptRequest."""

    model: str
    node: str | None = None
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    think: bool | str | None = None
    messages: list[Message] = field(default_factory=list)

    def make_request(self, text: str) -> PromptRequest:
        """The request that sends ``text`` as the next message."""
        first = () if self.system is None else (Message("system", self.system),)
        return PromptRequest(
            messages=(*first, *self.messages, Message("user", text)),
            model=self.model,
            node=self.node,
            options=dict(self.options),
            think=self.think,
        )

    def add_exchange(self, text: str, answer: str) -> None:
        """Adds a message and its answer, which may be a part of an answer that was stopped."""
        self.messages += [Message("user", text), Message("assistant", answer)]

    def to_json(self) -> str:
        """The conversation as the text of a file. The node is not a part of it."""
        document: dict[str, Any] = {"schema": SCHEMA, "model": self.model}
        if self.system is not None:
            document["system"] = self.system
        if self.options:
            document["options"] = self.options
        if self.think is not None:
            document["think"] = self.think
        document["messages"] = [_message_document(message) for message in self.messages]
        text = json.dumps(document, ensure_ascii=False, indent=1)
        return text.encode("utf-8", "replace").decode() + "\n"  # a server may send half of a surrogate pair


def _message_document(message: Message) -> Mapping[str, Any]:
    document: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        document["images"] = list(message.images)
    return document


def read_conversation(text: str, name: str) -> Conversation:
    """The conversation in the text of a file. ``name`` is the file's name, for the UsageError that a text of another
    form raises."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is no saved chat: it is not JSON", hint="`/save FILE` writes one") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise UsageError(f"{name} is no saved chat: it has no schema {SCHEMA}", hint="`/save FILE` writes one")
    model, system = document.get("model"), document.get("system")
    options, think = document.get("options", {}), document.get("think")
    entries = document.get("messages")
    if (
        not isinstance(model, str)
        or not (system is None or isinstance(system, str))
        or not isinstance(options, dict)
        or not (think is None or isinstance(think, (bool, str)))
        or not isinstance(entries, list)
        or not all(_is_message(entry) for entry in entries)
    ):
        raise UsageError(f"{name} is a damaged chat: a value in it has the wrong form")
    messages = [Message(entry["role"], entry["content"], tuple(entry.get("images", ()))) for entry in entries]
    return Conversation(model, None, system, options, think, messages)


def _is_message(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.get("role") not in _ROLES or not isinstance(entry.get("content"), str):
        return False
    images = entry.get("images", [])
    return isinstance(images, list) and all(isinstance(image, str) for image in images)
