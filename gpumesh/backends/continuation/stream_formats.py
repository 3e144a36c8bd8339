"""Which form each route's stream has."""

from __future__ import annotations

from gpumesh.backends.continuation.event_streams import EventStreamFormat, OpenAIChatFormat
from gpumesh.backends.continuation.ollama_streams import OllamaStreamFormat
from gpumesh.backends.continuation.stream_format import StreamFormat

_NATIVE = frozenset({"/api/chat", "/api/generate"})
_EVENTS = frozenset({"/v1/completions", "/v1/responses", "/v1/messages"})
_CHAT = "/v1/chat/completions"


def generates_text(path: str) -> bool:
    """Whether this route generates text, so that its stream has a final frame. ``path`` may have a query."""
    bare = path.partition("?")[0]
    return bare in _NATIVE or bare in _EVENTS or bare == _CHAT


def stream_format_for(path: str) -> StreamFormat:
    bare = path.partition("?")[0]
    if bare in _NATIVE:
        return OllamaStreamFormat(generate=bare == "/api/generate")
    return OpenAIChatFormat(path) if bare == _CHAT else EventStreamFormat(path)
