import json

import pytest

from gpumesh.errors import (
    BackendUnreachable,
    DeadlineExceeded,
    GPUMeshError,
    ModelMissing,
    NoNodeError,
    QueueFull,
    ServersFailed,
    UsageError,
)
from gpumesh.gateway import error_shapes
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.model_requests import ClientApi


@pytest.mark.parametrize(
    ("error", "status", "wait"),
    [
        (BadRequest("x", status=413), 413, None),
        (UsageError("x"), 400, None),
        (ModelMissing("m"), 404, None),
        (NoNodeError("x"), 503, 2),
        (ServersFailed("x"), 503, None),
        (QueueFull("x", retry_after_s=7.4), 503, 7),
        (QueueFull("x", retry_after_s=0.1), 503, 1),
        (DeadlineExceeded("x"), 504, None),
        (BackendUnreachable("x"), 502, None),
        (GPUMeshError("x"), 500, None),
    ],
)
def test_each_error_has_its_status(error: GPUMeshError, status: int, wait: int | None) -> None:
    assert error_shapes.error_status(error) == status
    assert error_shapes.retry_after_s(error) == wait


@pytest.mark.parametrize(("known_s", "told_s"), [(None, 2), (0.3, 2), (7.2, 8), (290.0, 60)])
def test_retry_after_says_when_a_node_is_tried_again(known_s: float | None, told_s: int) -> None:
    error = NoNodeError("x")
    error.retry_after_s = known_s
    assert error_shapes.retry_after_s(error) == told_s


def test_clients_are_told_not_to_repeat_a_request_that_servers_fail_at() -> None:
    """The clients of OpenAI and Anthropic repeat each 503, unless this header is there."""
    headers = dict(error_shapes.error_reply("/v1/chat/completions", ServersFailed("x")).headers)
    assert headers["X-Should-Retry"] == "false"
    assert "Retry-After" not in headers


def test_the_body_of_an_error_in_each_api() -> None:
    assert json.loads(error_shapes.error_body(ClientApi.OLLAMA, 404, "gone")) == {"error": "gone"}
    assert json.loads(error_shapes.error_body(ClientApi.OPENAI, 404, "gone")) == {
        "error": {"message": "gone", "type": "not_found_error", "param": None, "code": None}
    }
    assert json.loads(error_shapes.error_body(ClientApi.ANTHROPIC, 503, "busy")) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "busy"},
    }


@pytest.mark.parametrize(
    ("status", "openai", "anthropic"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (401, "authentication_error", "authentication_error"),
        (408, "invalid_request_error", "invalid_request_error"),
        (413, "invalid_request_error", "request_too_large"),
        (429, "rate_limit_error", "rate_limit_error"),
        (500, "api_error", "api_error"),
        (503, "api_error", "overloaded_error"),
        (504, "api_error", "api_error"),
    ],
)
def test_the_type_of_an_error_follows_its_status(status: int, openai: str, anthropic: str) -> None:
    assert json.loads(error_shapes.error_body(ClientApi.OPENAI, status, "x"))["error"]["type"] == openai
    assert json.loads(error_shapes.error_body(ClientApi.ANTHROPIC, status, "x"))["error"]["type"] == anthropic


def test_the_frame_of_an_error_in_each_api() -> None:
    assert error_shapes.error_frame(ClientApi.OLLAMA, 502, "cut") == b'{"error": "cut"}\n'
    assert error_shapes.error_frame(ClientApi.OPENAI, 502, "cut").startswith(b'data: {"error"')
    assert error_shapes.error_frame(ClientApi.ANTHROPIC, 502, "cut").startswith(b"event: error\ndata: {")


def test_the_message_of_a_missing_model_begins_as_ollamas_does() -> None:
    message = error_shapes.client_message(ModelMissing("m:7b", hint="there are: a, b"))
    assert message.startswith("model 'm:7b' not found")
    assert "there are: a, b" in message
