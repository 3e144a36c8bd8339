import pytest

from gpumesh.backends.continuation.chat_streams import OpenAIChatFormat
from gpumesh.backends.continuation.event_streams import CompletionStreamFormat, EventStreamFormat
from gpumesh.backends.continuation.ollama_streams import OllamaStreamFormat
from gpumesh.backends.continuation.stream_formats import generates_text, stream_format_for


@pytest.mark.parametrize(
    ("path", "kind", "keeps"),
    [
        ("/api/chat", OllamaStreamFormat, True),
        ("/api/generate?x=1", OllamaStreamFormat, True),
        ("/v1/chat/completions", OpenAIChatFormat, True),
        ("/v1/chat/completions?api-version=1", OpenAIChatFormat, True),
        ("/v1/completions", CompletionStreamFormat, False),
        ("/v1/responses", EventStreamFormat, False),
        ("/v1/messages", EventStreamFormat, False),
        ("/completion", EventStreamFormat, False),
    ],
)
def test_each_route_that_generates_has_its_form(path: str, kind: type, keeps: bool) -> None:
    assert generates_text(path)
    assert type(stream_format_for(path)) is kind
    assert stream_format_for(path).supports_continuation is keeps


@pytest.mark.parametrize("path", ["/api/pull", "/api/tags", "/v1/models", "/v1/embeddings", "/api/chat/x", "/"])
def test_other_routes_generate_nothing(path: str) -> None:
    assert not generates_text(path)
