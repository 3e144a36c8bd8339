"""What servers write in their error responses is understood, and what only looks like it is not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends.error_meanings import is_load_failure, says_model_is_missing
from gpumesh.backends.error_text import error_text

OLLAMA_LOG = "error loading model: unable to allocate CUDA0 buffer"


@pytest.mark.parametrize(
    "message",
    [
        "model requires more system memory (7.5 GiB) than is available (5.2 GiB)",
        f"llama runner process has terminated: {OLLAMA_LOG}",
        "llama-server process has terminated: exit status 1: cudaMalloc failed: out of memory",
        "llama-server reported out-of-memory during startup: CUDA error: out of memory",
        "timed out waiting for llama-server to start - ",
        "unable to load model: /root/.ollama/models/blobs/sha256-ab",
        "model failed to load, this may be due to resource limitations or an internal error",
        "insufficient memory - required allocations: {...}",
        "model requires 20.1 GiB but only 14.2 GiB are available (after 1.0 GiB overhead)",
        "model name=qwen failed to load",
        "Model load failed",
    ],
)
def test_messages_about_a_model_that_cannot_be_loaded(message: str) -> None:
    assert is_load_failure(500, message)
    assert is_load_failure(503, message)
    assert not is_load_failure(400, message), "an answer about the request"
    assert not is_load_failure(502, message), "a proxy does not know"


def test_507_is_about_memory_whatever_it_says() -> None:
    assert is_load_failure(507, "")


@pytest.mark.parametrize(
    "message",
    [
        "",
        "it answered 500",
        "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error",
        "server busy, please try again.  maximum pending requests exceeded",
        "failed to load image",
        "Loading model",
    ],
)
def test_messages_about_something_else(message: str) -> None:
    assert not is_load_failure(500, message)


@pytest.mark.parametrize(
    ("body", "model"),
    [
        ({"error": "model 'qwen2.5:7b' not found"}, "qwen2.5:7b"),
        ({"error": 'model "M" not found, try pulling it first'}, "m:latest"),
        ({"error": "model 'm:latest' not found"}, "m:latest"),
        ({"object": "error", "message": "The model `org/m` does not exist.", "type": "NotFoundError"}, "org/m:latest"),
        ({"error": {"type": "not_found_error", "message": "model: claude-x"}}, "claude-x:latest"),
    ],
)
def test_404_that_names_the_model(body: object, model: str) -> None:
    message = error_text(404, json.dumps(body).encode())
    assert says_model_is_missing(404, message, model)
    assert not says_model_is_missing(400, message, model)


@pytest.mark.parametrize(
    ("message", "model"),
    [
        ("404 page not found", "m:latest"),
        ("Not Found", "m:latest"),
        ("HTTP 404 without a word", "m:latest"),
        ("model 'm:7b' not found", "m:latest"),
        ("model 'big-m' not found", "m:latest"),
        ("model 'm2' not found", "m:latest"),
        ("model 'm:7b-instruct' not found", "m:7b"),
        ("no route for m", "m:latest"),
    ],
)
def test_404_about_something_else(message: str, model: str) -> None:
    assert not says_model_is_missing(404, message, model)


@given(st.integers(-1, 10_000), st.text(), st.text())
def test_no_message_makes_it_raise(status: int, message: str, model: str) -> None:
    is_load_failure(status, message)
    says_model_is_missing(status, message, model)


@pytest.mark.parametrize("spelling", ["library/m:7b", "registry.ollama.ai/library/m:7b", "M:7b"])
def test_a_server_repeats_the_name_as_the_client_wrote_it(spelling: str) -> None:
    assert says_model_is_missing(404, f"model '{spelling}' not found", "m:7b")
    assert not says_model_is_missing(404, f"model 'user/{spelling}' not found", "m:7b")
