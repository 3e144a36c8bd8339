"""The two APIs in which a request goes to the gateway: Ollama's own, and OpenAI's for models on other servers. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from gpumesh.backends import safe_json
from gpumesh.backends.base import ChatRequest, Chunk, HttpCall
from gpumesh.backends.base import Message as BackendMessage
from gpumesh.backends.dialects import DIALECTS
from gpumesh.backends.ollama import OllamaFrameReader
from gpumesh.backends.openai import OpenAIBodyReader, OpenAIEventReader
from gpumesh.library.arguments import Ask
from gpumesh.library.images import media_type
from gpumesh.library.messages import Message, ToolCall, read_tool_call

# Its requests are those that every server of OpenAI's API takes.
_GENERIC = next(dialect for dialect in DIALECTS.values() if dialect.is_generic)
_MAX_TOOL_CALLS = 256  # of one answer


class AnswerReader(Protocol):
    """Reads an answer's bytes. ``tool_calls`` are those that have come so far."""

    tool_calls: list[ToolCall]

    def feed(self, data: bytes) -> Sequence[Chunk]:
        """As ``BaseFrameReader.feed``."""

    def close(self) -> Sequence[Chunk]:
        """As ``BaseFrameReader.close``."""


# -- Ollama's own API ------------------------------------------------------------------------------------------------


def build_native_call(ask: Ask, *, model: str, stream: bool) -> HttpCall:
    """The request to ``/api/chat``, or to ``/api/generate``."""
    body: dict[str, Any] = {"model": model, "stream": stream}
    if ask.is_chat:
        body["messages"] = [_native_message(message) for message in ask.messages]
        if ask.tools:
            body["tools"] = list(ask.tools)
    else:
        *system, prompt = ask.messages
        body["prompt"] = prompt.content
        if system:
            body["system"] = system[0].content
        if prompt.images:
            body["images"] = list(prompt.images)
    for name, value in (("format", ask.format), ("think", ask.think), ("keep_alive", ask.keep_alive)):
        if value is not None:
            body[name] = value
    if ask.options:
        body["options"] = dict(ask.options)
    return HttpCall("POST", "/api/chat" if ask.is_chat else "/api/generate", _dump(body))


def _native_message(message: Message) -> dict[str, Any]:
    """The message in the form of Ollama's own API."""
    document: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        document["images"] = list(message.images)
    if message.tool_calls:
        document["tool_calls"] = [
            {"function": {"name": call.name, "arguments": dict(call.arguments)}} for call in message.tool_calls
        ]
    for name in ("tool_name", "tool_call_id", "thinking"):
        value = getattr(message, name)
        if value is not None:
            document[name] = value
    return document


class NativeReader(OllamaFrameReader):
    """Also reads the tool calls."""

    def __init__(self) -> None:
        super().__init__()
        self.tool_calls: list[ToolCall] = []

    def _read_frame(self, line: bytes, chunks: list[Chunk]) -> None:
        super()._read_frame(line, chunks)
        if b'"tool_calls"' in line:
            message = (safe_json.parse_object(line) or {}).get("message")
            entries = message.get("tool_calls") if isinstance(message, dict) else None
            self.tool_calls += read_whole_calls(entries, _MAX_TOOL_CALLS - len(self.tool_calls))


def read_whole_calls(entries: object, limit: int) -> list[ToolCall]:
    """The tool calls of a frame, without entries that are none."""
    calls = (read_tool_call(entry) for entry in safe_json.as_objects(entries, max(limit, 0)))
    return [call for call in calls if call is not None]


# -- OpenAI's API ----------------------------------------------------------------------------------------------------


def build_openai_call(ask: Ask, *, model: str, stream: bool) -> HttpCall:
    """The request to ``/v1/chat/completions``. ``generate`` is a chat of one message, as it is inside of Ollama."""
    texts = tuple(BackendMessage(message.role, message.content) for message in ask.messages)
    request = ChatRequest(model, texts, ask.options, stream, ask.think)
    call = _GENERIC.build_chat_call(request)
    body: dict[str, Any] = json.loads(call.body)
    body["messages"] = [_openai_message(message, number) for number, message in enumerate(ask.messages)]
    if ask.tools:
        body["tools"] = list(ask.tools)
    if ask.format == "json":
        body["response_format"] = {"type": "json_object"}
    elif ask.format is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ask.format}}
    return HttpCall(call.method, "/v1/chat/completions", _dump(body))


def _openai_message(message: Message, number: int) -> dict[str, Any]:
    """The message in the form of OpenAI's API. ``number``: its place in the chat, for the ids of calls that have
    none."""
    content: Any = message.content
    if message.images:
        content = [{"type": "text", "text": message.content}]
        for image in message.images:
            url = f"data:{media_type(str(image))};base64,{image!s}"
            content.append({"type": "image_url", "image_url": {"url": url}})
    document: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        document["tool_calls"] = [
            {
                "id": call.id or f"call_{number}_{index}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments))},
            }
            for index, call in enumerate(message.tool_calls)
        ]
    if message.role == "tool":
        # The answer to the first call of the message before, if the program does not say to which.
        document["tool_call_id"] = message.tool_call_id or f"call_{number - 1}_0"
    return document


class OpenAIBody(OpenAIBodyReader):
    """Also reads the tool calls."""

    def __init__(self) -> None:
        super().__init__()
        self.tool_calls: list[ToolCall] = []

    def _read_rest(self, chunks: list[Chunk]) -> None:
        super()._read_rest(chunks)
        entries = _first_choice(bytes(self._body), "message").get("tool_calls")
        self.tool_calls += read_whole_calls(entries, _MAX_TOOL_CALLS)


class OpenAIStream(OpenAIEventReader):
    """Also reads the tool calls, whose arguments come in pieces. They are known at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.tool_calls: list[ToolCall] = []
        self._parts: dict[int, dict[str, str]] = {}  # the name, id and arguments of each call, by its number

    def _read_event(self, event: bytes, chunks: list[Chunk]) -> None:
        """As the base class, and adds the parts of tool calls to ``_parts``."""
        super()._read_event(event, chunks)
        if b'"tool_calls"' not in event:
            return
        for entry in safe_json.as_objects(_first_choice(event, "delta").get("tool_calls"), _MAX_TOOL_CALLS):
            index, function = entry.get("index", 0), entry.get("function")
            if not isinstance(index, int) or not 0 <= index < _MAX_TOOL_CALLS or not isinstance(function, dict):
                continue
            part = self._parts.setdefault(index, {"name": "", "arguments": "", "id": ""})
            part["id"] = safe_json.as_text(entry.get("id")) or part["id"]
            part["name"] = safe_json.as_text(function.get("name")) or part["name"]
            part["arguments"] += safe_json.as_text(function.get("arguments")) or ""

    def _finish(self, chunks: list[Chunk]) -> None:
        super()._finish(chunks)
        for _, part in sorted(self._parts.items()):
            function = {"name": part["name"], "arguments": part["arguments"]}
            self.tool_calls += read_whole_calls([{"id": part["id"] or None, "function": function}], 1)


def _first_choice(document: bytes, key: str) -> Mapping[str, Any]:
    choices = safe_json.as_objects((safe_json.parse_object(document.strip()) or {}).get("choices"), 1)
    message = choices[0].get(key) if choices else None
    return message if isinstance(message, dict) else {}


def build_call(ask: Ask, *, model: str, stream: bool, is_native: bool) -> HttpCall:
    build = build_native_call if is_native else build_openai_call
    return build(ask, model=model, stream=stream)


def create_reader(*, stream: bool, is_native: bool) -> AnswerReader:
    if is_native:
        return NativeReader()
    return OpenAIStream() if stream else OpenAIBody()


def _dump(body: Mapping[str, Any]) -> bytes:
    """The body as JSON. Raises TypeError and ValueError for a value that JSON does not have."""
    return json.dumps(body, allow_nan=False).encode()
