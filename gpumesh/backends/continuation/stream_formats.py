"""The form of each route's stream, and how a server of each kind continues it."""

from __future__ import annotations

from collections.abc import Mapping

from gpumesh.backends.base import ContinuationMethod
from gpumesh.backends.continuation.event_streams import EventStreamFormat, MarkedChatFormat, OpenAIChatFormat
from gpumesh.backends.continuation.ollama_streams import OllamaStreamFormat
from gpumesh.backends.continuation.rendered_prompts import COMPLETION_PATH, RenderedPromptFormat
from gpumesh.backends.continuation.stream_format import StreamFormat
from gpumesh.backends.dialects import DIALECTS
from gpumesh.topology import BackendKind

_NATIVE = frozenset({"/api/chat", "/api/generate"})
_EVENTS = frozenset({"/v1/completions", "/v1/responses", "/v1/messages"})
_CHAT = "/v1/chat/completions"
_CHAT_FORMATS: Mapping[ContinuationMethod, type[OpenAIChatFormat]] = {
    ContinuationMethod.TEMPLATE: OpenAIChatFormat,
    ContinuationMethod.MARKED: MarkedChatFormat,
    ContinuationMethod.RENDERED_PROMPT: RenderedPromptFormat,
}


def generates_text(path: str) -> bool:
    """Whether this route generates text, so that its stream has a final frame. ``path`` may have a query."""
    bare = path.partition("?")[0]
    return bare in _NATIVE or bare in _EVENTS or bare in (_CHAT, COMPLETION_PATH)


def stream_format_for(path: str) -> StreamFormat:
    """How a stream of this route is read and ended."""
    bare = path.partition("?")[0]
    if bare in _NATIVE:
        return OllamaStreamFormat(generate=bare == "/api/generate")
    return OpenAIChatFormat(path) if bare == _CHAT else EventStreamFormat(path)


def continuation_format_for(path: str, kind: BackendKind) -> StreamFormat:
    """The same form, with the way in which this kind of server continues it."""
    if path.partition("?")[0] != _CHAT:
        return stream_format_for(path)
    return _CHAT_FORMATS[DIALECTS[kind].continuation](path)
