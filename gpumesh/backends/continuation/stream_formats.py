"""The registry of stream formats: the format of each route, and how each kind of server continues a stream."""

from __future__ import annotations

from collections.abc import Mapping

from gpumesh.backends.base import ContinuationMethod
from gpumesh.backends.continuation.chat_streams import AnyServerChatFormat, MarkedChatFormat, OpenAIChatFormat
from gpumesh.backends.continuation.event_streams import CompletionStreamFormat, EventStreamFormat
from gpumesh.backends.continuation.ollama_streams import OllamaStreamFormat
from gpumesh.backends.continuation.received_text import byte_length
from gpumesh.backends.continuation.rendered_prompts import COMPLETION_PATH, RenderedPromptFormat
from gpumesh.backends.continuation.stream_format import StreamFormat
from gpumesh.backends.dialects import DIALECTS
from gpumesh.topology import BackendKind

MAX_COUNTED_BYTES = 256 << 10  # the text of a longer whole answer is not counted: it would take a millisecond
_OLLAMA_PATHS = frozenset({"/api/chat", "/api/generate"})
_EVENT_STREAM_PATHS = frozenset({"/v1/completions", "/v1/responses", "/v1/messages"})
_CHAT_PATH = "/v1/chat/completions"
_CHAT_FORMATS: Mapping[ContinuationMethod, type[OpenAIChatFormat]] = {
    ContinuationMethod.TEMPLATE: OpenAIChatFormat,
    ContinuationMethod.MARKED: MarkedChatFormat,
    ContinuationMethod.RENDERED_PROMPT: RenderedPromptFormat,
    ContinuationMethod.FOUND_OUT: AnyServerChatFormat,
}


def generates_text(path: str) -> bool:
    """Whether this route generates text, so that its stream has a final frame. ``path`` may hold a query."""
    route = path.partition("?")[0]
    return route in _OLLAMA_PATHS or route in _EVENT_STREAM_PATHS or route in (_CHAT_PATH, COMPLETION_PATH)


def stream_format_for(path: str) -> StreamFormat:
    """The format that reads and ends a stream of this route."""
    route = path.partition("?")[0]
    if route in _OLLAMA_PATHS:
        return OllamaStreamFormat(generate=route == "/api/generate")
    if route == _CHAT_PATH:
        return OpenAIChatFormat(path)
    if route == "/v1/completions":
        return CompletionStreamFormat(path)
    return EventStreamFormat(path)


def count_text_bytes(path: str, body: bytes) -> int | None:
    """The bytes of text and thinking in a whole answer of this route; ``None`` if they cannot be counted, or if the
    answer is long or also holds what is no text (tool calls)."""
    if len(body) > MAX_COUNTED_BYTES or b'"tool_calls"' in body:
        return None
    pieces = stream_format_for(path).extract_texts(body)
    return sum(byte_length(text) for text in (*pieces.texts, *pieces.thinking_texts)) or None


def continuation_format_for(path: str, kind: BackendKind) -> StreamFormat:
    """The format of this route that continues a stream on this kind of server. Only chats of ``/v1`` are continued
    differently by different kinds."""
    if path.partition("?")[0] != _CHAT_PATH:
        return stream_format_for(path)
    return _CHAT_FORMATS[DIALECTS[kind].continuation](path)
