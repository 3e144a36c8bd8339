import pytest

from gpumesh.backends.continuation.event_streams import Events, OpenAIChat
from gpumesh.backends.continuation.forms import form_of, generates
from gpumesh.backends.continuation.ollama_streams import Native


@pytest.mark.parametrize(
    ("path", "kind", "keeps"),
    [
        ("/api/chat", Native, True),
        ("/api/generate?x=1", Native, True),
        ("/v1/chat/completions", OpenAIChat, True),
        ("/v1/chat/completions?api-version=1", OpenAIChat, True),
        ("/v1/completions", Events, False),
        ("/v1/responses", Events, False),
        ("/v1/messages", Events, False),
    ],
)
def test_each_route_that_generates_has_its_form(path: str, kind: type, keeps: bool) -> None:
    assert generates(path)
    assert type(form_of(path)) is kind
    assert form_of(path).keeps is keeps


@pytest.mark.parametrize("path", ["/api/pull", "/api/tags", "/v1/models", "/v1/embeddings", "/api/chat/x", "/"])
def test_other_routes_generate_nothing(path: str) -> None:
    assert not generates(path)
