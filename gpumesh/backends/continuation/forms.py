"""Which form each route's stream has."""

from __future__ import annotations

from gpumesh.backends.continuation.event_streams import Events, OpenAIChat
from gpumesh.backends.continuation.form import Form
from gpumesh.backends.continuation.ollama_streams import Native

_NATIVE = frozenset({"/api/chat", "/api/generate"})
_EVENTS = frozenset({"/v1/completions", "/v1/responses", "/v1/messages"})
_CHAT = "/v1/chat/completions"


def generates(path: str) -> bool:
    """Whether this route generates text, so that its stream has a final frame. ``path`` may have a query."""
    bare = path.partition("?")[0]
    return bare in _NATIVE or bare in _EVENTS or bare == _CHAT


def form_of(path: str) -> Form:
    bare = path.partition("?")[0]
    if bare in _NATIVE:
        return Native(generate=bare == "/api/generate")
    return OpenAIChat(path) if bare == _CHAT else Events(path)
