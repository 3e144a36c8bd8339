"""The forms of /v1 by themselves; with a model at the other end they are tested in test_continuation.py."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends.continuation.chat_streams import MarkedChatFormat, OllamaAsOpenAIFormat, OpenAIChatFormat
from gpumesh.backends.continuation.event_streams import EventStreamFormat, event_data
from gpumesh.backends.continuation.stream_format import Frame, PartialAnswer, TextPieces

CHAT = OpenAIChatFormat("/v1/chat/completions")
HEAD = {"id": "1", "object": "chat.completion.chunk", "created": 5, "model": "m", "service_tier": "x"}


def event(delta: dict[str, Any], reason: str | None = None, *, end: bytes = b"\n\n", **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice], **more}, separators=(",", ":")).encode() + end


@given(
    st.lists(st.tuples(st.text(), st.sampled_from(["content", "reasoning", "reasoning_content"])), max_size=20),
    st.sampled_from([b"\n\n", b"\r\n\r\n"]),
)
def test_reading_many_at_once_gives_what_reading_each_gives(pieces: list[tuple[str, str]], end: bytes) -> None:
    events = [event({key: text}, end=end) for text, key in pieces]
    frames = [CHAT.read(one) for one in events]
    texts = tuple(frame.text for frame in frames if frame.text)
    thoughts = tuple(frame.thinking for frame in frames if frame.thinking)
    assert CHAT.extract_texts(b": ping" + end + b"".join(events)) == TextPieces(texts, thoughts)


@pytest.mark.parametrize(
    ("frame", "plain"),
    [
        (event({"content": "x"}), True),
        (event({"content": '"finish_reason":"stop"'}), True),
        (event({"content": "[DONE]"}), True),
        (event({}, "stop"), False),
        (event({}, usage={"prompt_tokens": 1}), False),
        (event({"content": "x"}, usage=None), True),
        (event({"tool_calls": []}), False),
        (b"data: [DONE]\n\n", False),
        (b'data: {"error":{}}\n\n', False),
        (b"error: {}\n\n", False),
        (b'event: message_stop\ndata: {"type":"message_stop"}\n\n', False),
        (b'data: {"type":"response.completed"}\n\n', False),
    ],
)
def test_what_must_be_looked_at(frame: bytes, plain: bool) -> None:
    assert (CHAT.find_marks(frame) is None) is plain
    assert (CHAT.find_marks(event({"content": "x"}) + frame) is None) is plain


@pytest.mark.parametrize(
    ("frame", "data"),
    [
        (b"data: x\n\n", b"x"),
        (b"data:x\r\n\r\n", b"x"),
        (b"event: e\ndata: a\ndata: b\n\n", b"a\nb"),
        (b": ping\n\n", b""),
        (b'error: {"code":500}\n\n', b'{"error":{"code":500}}'),
    ],
)
def test_the_data_of_an_event(frame: bytes, data: bytes) -> None:
    assert event_data(frame) == data


@pytest.mark.parametrize("kind", ["message_stop", "response.completed", "response.incomplete", "response.failed"])
def test_what_ends_a_stream(kind: str) -> None:
    frame = EventStreamFormat("/v1/messages").read(b'data: {"type":"' + kind.encode() + b'"}\n\n')
    assert frame.ends_stream
    assert frame.text_complete


@pytest.mark.parametrize(
    ("path", "start"),
    [
        ("/v1/messages", b"event: error\n"),
        ("/v1/responses?x=1", b"event: error\n"),
        ("/v1/completions", b'data: {"error":{"message":"it broke"'),
        ("/v1/chat/completions", b'data: {"error":{"message":"it broke"'),
    ],
)
def test_errors_in_each_dialects_shape(path: str, start: bytes) -> None:
    frame = EventStreamFormat(path).error_frame("it broke")
    assert frame.startswith(start)
    assert "it broke" in event_data(frame).decode()


def test_the_budget_is_the_lower_of_two_names_for_it() -> None:
    assert CHAT.token_budget({"max_tokens": 9, "max_completion_tokens": 7}) == 7
    assert CHAT.token_budget({"max_tokens": -1}) is None
    assert CHAT.token_budget({}) is None


def test_timings_of_llama_server_are_those_of_the_whole_answer() -> None:
    timings = {"prompt_n": 5, "predicted_n": 6, "predicted_ms": 60.0, "predicted_per_second": 100.0}
    partial_answer = PartialAnswer(text="x", tokens=4, spent_ms=40.0, cuts=1, first_frame=HEAD)
    document = json.loads(CHAT.translate(CHAT.read(event({}, "stop", timings=timings)), partial_answer)[6:])
    assert document["timings"] == {
        **timings,
        "predicted_n": 10,
        "predicted_ms": 100.0,
        "predicted_per_token_ms": 10.0,
        "predicted_per_second": 100.0,
    }
    assert document["gpumesh"] == {"continued": 1, "tokens_before": 4}
    assert document["id"] == "1"


def test_the_clients_stream_opens_once() -> None:
    opening = CHAT.read(event({"role": "assistant", "content": ""}))
    assert CHAT.translate(opening, PartialAnswer(first_frame=HEAD)) == b""
    assert CHAT.translate(opening, PartialAnswer()) != b""
    assert CHAT.translate(Frame(), PartialAnswer(first_frame=HEAD)) == b""


def test_parts_of_a_content_are_messages_of_their_own_as_in_ollama() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = {"model": "m", "messages": [{"role": "user", "content": parts}], "stop": ["x"], "max_tokens": 5}
    call = CHAT.render_call(request, "")
    assert call is not None
    body = json.loads(call.body)
    assert call.path == "/api/chat"
    assert [message["content"] for message in body["messages"][:-1]] == ["a", "b"]
    assert body["options"] == {"temperature": 1.0, "top_p": 1.0, "stop": ["x"], "num_predict": 1}
    assert CHAT.raw_prompt_refusal(request) is None


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url"}]},
        {"role": "assistant", "content": "x", "tool_calls": [{}]},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
        "x",
    ],
)
def test_what_cannot_be_told_as_text(message: Any) -> None:
    assert CHAT.raw_prompt_refusal({"messages": [message, {"role": "user", "content": "y"}]}) is not None


@pytest.mark.parametrize(("effort", "think"), [("none", False), ("high", "high")])
def test_the_effort_of_reasoning_is_ollamas_think(effort: str, think: object) -> None:
    request = {"model": "m", "messages": [{"role": "user", "content": "x"}], "reasoning_effort": effort}
    call = CHAT.render_call(request, "")
    assert call is not None
    assert json.loads(call.body)["think"] == think


def test_a_native_rest_ends_as_openais_streams_end() -> None:
    form = OllamaAsOpenAIFormat(usage=True)
    partial_answer = PartialAnswer(text="x", tokens=2, cuts=1, first_frame=HEAD)
    final = b'{"response":"","done":true,"done_reason":"length","prompt_eval_count":7,"eval_count":3}\n'
    lines = form.translate(form.read(final), partial_answer).split(b"\n\n")
    finish, usage = json.loads(lines[0][6:]), json.loads(lines[1][6:])
    assert finish["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    assert lines[2:] == [b"data: [DONE]", b""]


def test_only_other_kinds_are_told_to_go_on() -> None:
    request = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    partial_answer = PartialAnswer(text="x", thinking="t", tokens=3)
    body = json.loads(CHAT.continue_assistant_message(request, partial_answer).call.body)
    assert not body.keys() & {"continue_final_message", "add_generation_prompt", "chat_template_kwargs"}
    assert body["max_tokens"] == 1
    assert body["messages"][-1]["reasoning_content"] == "t"
    request["chat_template_kwargs"] = {"a": 1, "enable_thinking": True}
    body = json.loads(
        MarkedChatFormat("/v1/chat/completions").continue_assistant_message(request, partial_answer).call.body
    )
    assert body["continue_final_message"] is True
    assert body["add_generation_prompt"] is False
    assert body["chat_template_kwargs"] == {"a": 1, "enable_thinking": False}
