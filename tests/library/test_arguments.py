"""Wrong arguments are a TypeError or a ValueError that says what was expected; right ones have many forms."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

import gpumesh
from gpumesh.library import arguments, batch
from gpumesh.library.gateway_link import GatewayAddress, read_error
from gpumesh.library.images import encode_image
from gpumesh.library.messages import Message, ToolCall, read_messages
from gpumesh.library.tools import describe_function, read_tools
from gpumesh.library.wire_forms import OpenAIBody, OpenAIStream, build_call
from gpumesh.mesh.chat import read_messages as read_core_messages

IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(40)
ENCODED = base64.b64encode(IMAGE).decode()


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: read_messages(7), TypeError, "not int"),
        (lambda: read_messages([7]), TypeError, r"messages\[0\] is a text, a gpumesh.Message, or a dictionary"),
        (lambda: read_messages([]), ValueError, "empty"),
        (lambda: read_messages([{"content": "hi"}]), ValueError, r"messages\[0\] has no role"),
        (lambda: read_messages([{"role": "user"}]), ValueError, "no content"),
        (lambda: read_messages([{"role": "user", "contents": "hi"}]), ValueError, "did you mean 'content'"),
        (lambda: read_messages([{"role": "person", "content": "hi"}]), ValueError, "system, user, assistant, tool"),
        (lambda: read_messages([{"role": "user", "content": 7}]), TypeError, "content is text"),
        (lambda: read_messages([{"role": "user", "content": "x", "images": b"x"}]), TypeError, "a list"),
        (lambda: encode_image("cat.png"), ValueError, "neither base64 text nor a file"),
        (lambda: encode_image(7), TypeError, "bytes, a path or base64"),
        (lambda: read_tools("weather"), TypeError, "a list of functions"),
        (lambda: read_tools([{"name": "x"}]), ValueError, '"function"'),
        (lambda: read_tools([lambda *args: args]), ValueError, "by name"),
        (lambda: arguments.read_steering(priority="urgent"), ValueError, "interactive, normal, batch"),
        (lambda: arguments.read_steering(timeout="10"), TypeError, "seconds"),
        (lambda: arguments.read_steering(timeout=-1), ValueError, "more than 0"),
        (lambda: arguments.read_steering(session="a\r\nX-Evil: 1"), ValueError, "one line"),
        (lambda: arguments.read_options([("temperature", 0)]), TypeError, "dictionary"),
        (lambda: arguments.read_format("yaml"), ValueError, '"json"'),
        (lambda: arguments.read_format(7), TypeError, "pydantic"),
        (lambda: arguments.read_model(""), ValueError, "default model"),
        (lambda: arguments.read_input(b"x"), TypeError, "list of texts"),
        (lambda: arguments.read_input(["a", 7]), TypeError, r"input\[1\]"),
        (lambda: batch.require_prompts("hi", None), TypeError, "iterable"),
        (lambda: batch.require_prompts([], 0), ValueError, "at least 1"),
        (lambda: batch.read_prompt({"text": "hi"}, {}), ValueError, '"prompt" or "messages"'),
        (lambda: batch.read_prompt({"prompt": "hi", "modle": "x"}, {"model": None}), ValueError, "modle"),
        (lambda: gpumesh.connect(7), TypeError, "mesh.yaml"),  # type: ignore[arg-type]
        (lambda: gpumesh.connect().chat("m", "hi"), RuntimeError, "async with gpumesh.connect"),
        (lambda: gpumesh.connect_sync().chat("m", "hi"), RuntimeError, "is not open"),
        (lambda: read_core_messages([7]), TypeError, r"messages\[0\]"),
        (lambda: read_core_messages([{"role": "user", "content": "x", "tool_calls": []}]), ValueError, "tool_calls"),
    ],
)
def test_wrong_arguments_say_what_was_expected(call: Callable[[], object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_forms_of_messages(tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    file.write_bytes(IMAGE)
    for image in (IMAGE, file, str(file), ENCODED, f"data:image/png;base64,{ENCODED}"):
        assert read_messages({"role": "user", "content": "x", "images": [image]})[0].images == (ENCODED,)
    parts = [
        {"type": "text", "text": "x"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{ENCODED}"}},
    ]
    assert read_messages([{"role": "user", "content": parts}]) == (Message("user", "x", (ENCODED,)),)
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    (message,) = read_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message.tool_calls == (ToolCall("f", {"a": 1}, "1"),)
    core = read_core_messages([{"role": "user", "content": "hi"}, gpumesh.Message("user", "ho")])
    assert [(message.role, message.content) for message in core] == [("user", "hi"), ("user", "ho")]


def test_a_function_becomes_a_schema() -> None:
    def weather(city: str, days: int = 1, unit: Literal["C", "F"] | None = None, tags: list[str] | None = None) -> str:
        """The weather
        of a city.

        Not for the model."""
        return city

    function = describe_function(weather)["function"]
    assert (function["name"], function["description"]) == ("weather", "The weather of a city.")
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "F"]},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["city"],
    }


def test_openai_form() -> None:
    tool = describe_function(lambda city: city)
    messages = read_messages(
        [
            Message("user", "x", [IMAGE]),
            Message("assistant", "", tool_calls=[ToolCall("f", {"a": 1})]),
            Message("tool", "sunny", tool_name="f"),
        ]
    )
    ask = arguments.Ask(messages, tools=(tool,), format={"type": "object"}, options={"num_predict": 5})
    body: dict[str, Any] = json.loads(build_call(ask, model="m", stream=False, is_native=False).body)
    assert body["max_tokens"] == 5
    assert body["messages"][0]["content"][1]["image_url"]["url"] == f"data:image/png;base64,{ENCODED}"
    assert body["messages"][1]["tool_calls"][0]["id"] == body["messages"][2]["tool_call_id"]
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_tool_calls_of_openai_streams_come_in_pieces() -> None:
    reader = OpenAIStream()
    parts: list[dict[str, Any]] = [
        {"index": 0, "id": "c1", "function": {"name": "f", "arguments": '{"ci'}},
        {"index": 0, "function": {"arguments": 'ty": "Oslo"}'}},
    ]
    for part in parts:
        reader.feed(f"data: {json.dumps({'choices': [{'delta': {'tool_calls': [part]}}]})}\n\n".encode())
    reader.feed(b'data: {"choices":[{"delta":{},"finish_reason":"tool_calls"}]}\n\ndata: [DONE]\n\n')
    assert reader.tool_calls == [ToolCall("f", {"city": "Oslo"}, "c1")]
    whole = OpenAIBody()
    message = {"content": None, "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}]}
    whole.feed(json.dumps({"choices": [{"message": message, "finish_reason": "tool_calls"}]}).encode())
    whole.close()
    assert whole.tool_calls == [ToolCall("f", {}, "c1")]


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "model-missing", gpumesh.ModelMissing),
        (503, "queue-full", gpumesh.QueueFull),
        (503, "no-node", gpumesh.NoNodeError),
        (503, "servers-failed", gpumesh.ServersFailed),
        (504, "deadline", gpumesh.DeadlineExceeded),
        (401, "bad-request", gpumesh.UsageError),
        (400, None, gpumesh.BackendStatus),
        (503, None, gpumesh.BackendStatus),
    ],
)
def test_errors_of_the_gateway_come_back(status: int, code: str | None, kind: type[gpumesh.GPUMeshError]) -> None:
    headers = {"Retry-After": "7"} if code is None else {"Retry-After": "7", "X-GPUMesh-Error": code}
    error = read_error(status, headers, b'{"error": "it is so; do this"}', model="m")
    assert type(error) is kind
    if isinstance(error, gpumesh.QueueFull):
        assert error.retry_after_s == 7


def test_a_key_is_in_no_text() -> None:
    assert "s3cret" not in repr(GatewayAddress("http://127.0.0.1:1", "s3cret"))


def test_all_public_names_exist() -> None:
    assert [name for name in gpumesh.__all__ if not hasattr(gpumesh, name)] == []
    assert set(gpumesh.__all__) <= set(dir(gpumesh))
