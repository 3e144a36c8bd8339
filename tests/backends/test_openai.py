from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends import openai
from gpumesh.backends.base import ChatRequest, Chunk, Message, ServerCounters
from gpumesh.backends.frames import BODY_LIMIT
from gpumesh.backends.openai import OpenAIBodyReader, OpenAIDialect, OpenAIEventReader
from gpumesh.errors import BackendError, ProbeError, StreamCut
from tests.backends.test_frames import pieces

OPENAI = OpenAIDialect()
USAGE = {"prompt_tokens": 26, "completion_tokens": 298, "total_tokens": 324}
TIMINGS = {"prompt_n": 20, "cache_n": 6, "prompt_ms": 500.0, "predicted_n": 298, "predicted_ms": 3000.0}
DONE = b"data: [DONE]\n\n"


def event(**frame: Any) -> bytes:
    return b"data: " + json.dumps(frame, ensure_ascii=False).encode() + b"\n\n"


def delta(reason: str | None = None, **said: Any) -> bytes:
    return event(object="chat.completion.chunk", choices=[{"index": 0, "delta": said, "finish_reason": reason}])


ANSWER = (
    delta(role="assistant", content="")
    + delta(reasoning_content="hm")
    + delta(content="Hé")
    + b": keepalive\n\n"
    + delta(content="llo 日本")
    + delta("stop")
    + event(choices=[], usage=USAGE)
    + DONE
)


def read(data: bytes, places: Sequence[int] = ()) -> list[Chunk]:
    reader = OpenAIEventReader()
    chunks = [chunk for piece in pieces(data, list(places)) for chunk in reader.feed(piece)]
    return [*chunks, *reader.close()]


def read_whole(data: bytes) -> Chunk:
    reader = OpenAIBodyReader()
    for piece in pieces(data, [5, 9]):
        assert reader.feed(piece) == []
    (chunk,) = reader.close()
    return chunk


# -- requests --------------------------------------------------------------------------------------------------------


def test_a_chat_as_it_is_sent() -> None:
    messages = (Message("user", "What is this?", images=("iVBORw0KGgo=", "/9j/4AAQ")),)
    options = {"temperature": 0.5, "num_predict": 64, "num_ctx": 8192, "seed": 7, "stop": ["x"]}
    call = OPENAI.build_chat_call(ChatRequest("m", messages, options))
    assert (call.method, call.path) == ("POST", "/v1/chat/completions")
    assert json.loads(call.body) == {
        "model": "m",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
                    {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9j/4AAQ"}},
                ],
            }
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "max_tokens": 64,
        "seed": 7,
        "stop": ["x"],
    }


@pytest.mark.parametrize("unbounded", [-1, -2, 0, "x"])
def test_no_bound_is_not_sent_as_one(unbounded: Any) -> None:
    """Ollama's -1 means: until it is done; OpenAI's servers refuse it."""
    body = json.loads(OPENAI.build_chat_call(ChatRequest("m", (), {"num_predict": unbounded})).body)
    assert "max_tokens" not in body


@pytest.mark.parametrize(
    ("think", "key", "value"),
    [
        (True, "chat_template_kwargs", {"enable_thinking": True}),
        (False, "chat_template_kwargs", {"enable_thinking": False}),
        ("low", "reasoning_effort", "low"),
    ],
)
def test_thinking(think: bool | str, key: str, value: Any) -> None:
    assert json.loads(OPENAI.build_chat_call(ChatRequest("m", (), think=think)).body)[key] == value


def test_usage_is_asked_for_in_streams_only() -> None:
    assert "stream_options" not in json.loads(OPENAI.build_chat_call(ChatRequest("m", (), stream=False)).body)


# -- streams ---------------------------------------------------------------------------------------------------------


def test_an_answer_cut_at_every_byte() -> None:
    whole = read(ANSWER)
    assert whole == [
        Chunk(thinking="hm"),
        Chunk("Hé"),
        Chunk("llo 日本"),
        Chunk(done=True, done_reason="stop", counters=ServerCounters(26, 298)),
    ]
    for place in range(len(ANSWER) + 1):
        assert read(ANSWER, [place]) == whole
    assert read(ANSWER, range(len(ANSWER))) == whole, "byte by byte"


def test_an_answer_that_stops_before_its_reason_is_cut() -> None:
    """After the reason all of the text has come: some servers close without [DONE]."""
    text_is_complete = ANSWER.index(b'"stop"')
    for place in range(len(ANSWER)):
        reader = OpenAIEventReader()
        reader.feed(ANSWER[:place])
        if place <= text_is_complete:
            with pytest.raises(StreamCut):
                reader.close()
    reader = OpenAIEventReader()
    reader.feed(ANSWER.removesuffix(DONE))
    (last,) = reader.close()
    assert (last.done, last.done_reason, last.counters) == (True, "stop", ServerCounters(26, 298))


def test_done_without_anything_finished_is_cut() -> None:
    """Ollama's /v1 after its runner died: an empty delta, perhaps [DONE]; the error's text is lost."""
    reader = OpenAIEventReader()
    assert reader.feed(delta(content="some") + delta(content="") + DONE) == [Chunk("some")]
    with pytest.raises(StreamCut):
        reader.close()


@pytest.mark.parametrize(
    "data",
    [
        event(error={"message": "out of memory", "code": 500}),
        b'error: {"code":500,"message":"out of memory","type":"server_error"}\n\n',
        event(error="out of memory"),
    ],
)
def test_an_error_in_mid_answer_comes_after_what_was_said(data: bytes) -> None:
    reader = OpenAIEventReader()
    assert reader.feed(delta(content="some") + data + delta(content="more")) == [Chunk("some")]
    with pytest.raises(BackendError, match="out of memory"):
        reader.feed(b"")
    with pytest.raises(BackendError, match="out of memory"):
        reader.close()


@pytest.mark.parametrize("data", [b"data: nonsense\n\n", b"data: [1]\n\n"])
def test_what_is_no_event(data: bytes) -> None:
    with pytest.raises(ProbeError) as caught:
        OpenAIEventReader().feed(data)
    assert caught.value.finding_code == "wrong-server"


def test_a_completion_is_read_as_well() -> None:
    chunks = read(
        event(choices=[{"text": "ab", "finish_reason": None}])
        + event(choices=[{"text": "", "finish_reason": "length"}])
        + DONE
    )
    assert [chunk.text for chunk in chunks] == ["ab", ""]
    assert chunks[-1].done_reason == "length"


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4))
def test_no_bytes_crash_the_readers(data: bytes, places: list[int]) -> None:
    for one in (lambda: read(b"data: " + data + b"\n\n", places), lambda: read_whole(data)):
        try:
            one()
        except (BackendError, ProbeError) as error:
            assert str(error).isprintable()


FRAME = st.dictionaries(
    st.sampled_from(("choices", "usage", "timings", "error", "object")),
    st.none()
    | st.integers()
    | st.text(max_size=3)
    | st.lists(
        st.dictionaries(
            st.sampled_from(("delta", "message", "text", "finish_reason")),
            st.none() | st.integers() | st.just({"content": 5}),
        )
    )
    | st.dictionaries(
        st.sampled_from(("prompt_tokens", "completion_tokens", "prompt_n", "predicted_ms")), st.none() | st.floats()
    ),
)


@given(FRAME)
def test_no_frame_crashes_the_readers(frame: dict[str, Any]) -> None:
    for one in (lambda: read(event(**frame) + DONE), lambda: read_whole(json.dumps(frame).encode())):
        try:
            one()
        except (BackendError, ProbeError) as error:
            assert str(error).isprintable()


# -- answers in one piece --------------------------------------------------------------------------------------------


def test_an_answer_in_one_piece() -> None:
    frame = {"choices": [{"message": {"content": "Hé", "reasoning": "hm"}, "finish_reason": "stop"}], "usage": USAGE}
    chunk = read_whole(json.dumps(frame).encode())
    assert chunk == Chunk("Hé", "hm", done=True, done_reason="stop", counters=ServerCounters(26, 298))


@pytest.mark.parametrize("data", [b"", b'{"choices":[{"message":{"content":"He'])
def test_half_an_answer_is_cut(data: bytes) -> None:
    with pytest.raises(StreamCut):
        read_whole(data)


def test_an_answer_that_is_none() -> None:
    with pytest.raises(ProbeError, match="is no answer"):
        read_whole(b"<html>")
    with pytest.raises(BackendError, match="too long"):
        read_whole(b'{"error":{"message":"too long"}}')


def test_an_endless_answer_does_not_fill_memory() -> None:
    reader = OpenAIBodyReader()
    piece = b"x" * (1 << 22)
    with pytest.raises(ProbeError, match="64 MiB"):
        _feed(reader, piece)


def _feed(reader: OpenAIBodyReader, piece: bytes) -> None:
    for _ in range(BODY_LIMIT // len(piece) + 1):
        reader.feed(piece)


# -- counters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "found"),
    [
        ({}, None),
        ({"usage": None, "timings": 5}, None),
        ({"usage": USAGE}, ServerCounters(26, 298)),
        ({"usage": {"input_tokens": 3, "output_tokens": 4}}, ServerCounters(3, 4)),
        ({"timings": TIMINGS}, ServerCounters(26, 298, prompt_ms=500.0, eval_ms=3000.0, cached_tokens=6)),
        (
            {"usage": USAGE, "timings": TIMINGS},
            ServerCounters(26, 298, prompt_ms=500.0, eval_ms=3000.0, cached_tokens=6),
        ),
        ({"usage": {"prompt_tokens": -1, "completion_tokens": "x"}}, ServerCounters()),
    ],
)
def test_counters(frame: dict[str, Any], found: ServerCounters | None) -> None:
    assert openai.parse_counters(frame) == found


@pytest.mark.parametrize(
    ("usage", "prompt_tokens", "cached_tokens"),
    [
        # llama-server, vLLM and SGLang on /v1/chat/completions and /v1/completions
        ({"prompt_tokens": 26, "prompt_tokens_details": {"cached_tokens": 20}}, 26, 20),
        ({"prompt_tokens": 26, "prompt_tokens_details": {"cached_tokens": 0}}, 26, 0),
        ({"prompt_tokens": 26, "prompt_tokens_details": None}, 26, None),
        ({"prompt_tokens": 26, "prompt_tokens_details": {"cached_tokens": None}}, 26, None),
        # /v1/responses: Ollama's 0 is no count
        ({"input_tokens": 26, "input_tokens_details": {"cached_tokens": 20}}, 26, 20),
        ({"input_tokens": 26, "input_tokens_details": {"cached_tokens": 0}}, 26, None),
        # /v1/messages: the three counts add up to the prompt
        ({"input_tokens": 6, "cache_read_input_tokens": 20}, 26, 20),
        ({"input_tokens": 6, "cache_read_input_tokens": 0}, 6, 0),
        ({"input_tokens": 6, "cache_read_input_tokens": 10, "cache_creation_input_tokens": 10}, 26, 10),
        ({"input_tokens": 6, "cache_read_input_tokens": None, "cache_creation_input_tokens": None}, 6, None),
        # what no server can mean
        ({"prompt_tokens": 26, "prompt_tokens_details": {"cached_tokens": 27}}, 26, None),
        ({"prompt_tokens": 26, "prompt_tokens_details": {"cached_tokens": -1}}, 26, None),
        ({"prompt_tokens": 26, "prompt_tokens_details": {"cached_tokens": 1e300}}, 26, None),
        ({"prompt_tokens": 26, "prompt_tokens_details": [5]}, 26, None),
        ({"prompt_tokens_details": {"cached_tokens": 5}}, None, None),
    ],
)
def test_cached_tokens(usage: dict[str, Any], prompt_tokens: int | None, cached_tokens: int | None) -> None:
    counters = openai.parse_counters({"usage": usage})
    assert counters is not None
    assert (counters.prompt_tokens, counters.cached_tokens) == (prompt_tokens, cached_tokens)


# -- inventory -------------------------------------------------------------------------------------------------------


def answers(models: Any, status: int = 200, **more: tuple[int, Any]) -> dict[str, tuple[int, bytes] | None]:
    body = models if isinstance(models, bytes) else json.dumps(models).encode()
    rest = {name: (code, json.dumps(said).encode()) for name, (code, said) in more.items()}
    return {"models": (status, body), "health": None, "props": None, "version": None, **rest}


def test_what_only_lists_is_not_loaded() -> None:
    found = OPENAI.read_inventory(answers({"data": [{"id": "a", "owned_by": "library"}, {"id": "b"}, {"id": 5}, None]}))
    assert ([model.name for model in found.catalog], found.loaded, found.parallel) == (["a", "b"], (), None)


def test_vllm() -> None:
    model = {"id": "m", "owned_by": "vllm", "max_model_len": 32768}
    found = OPENAI.read_inventory(answers({"data": [model]}, version=(200, {"version": "0.9.1"})))
    assert (found.version, found.loaded[0].context_length) == ("0.9.1", 32768)


@pytest.mark.parametrize(
    ("given", "finding"),
    [
        ({"models": None}, "backend-down"),
        (answers(b"", 401), "key-refused"),
        (answers({"error": "x"}, 403), "key-refused"),
        (answers({"error": {"message": "Loading model"}}, 503), "backend-down"),
        (answers(b"", 429), "backend-down"),
        (answers(b"<html><title>hi</title>", 200), "wrong-server"),
        (answers({"models": []}), "wrong-server"),
        (answers(b"", 404), "wrong-server"),
        (answers(b'{"object":"list","da'), "answer-broken"),
        (answers({"data": [{"id": "m"}] * 10_001}), "models-too-many"),
        (answers({"data": [{"id": "m"}]}, health=(503, {"error": {"message": "Loading model"}})), "backend-down"),
    ],
)
def test_answers_that_are_none(given: dict[str, tuple[int, bytes] | None], finding: str) -> None:
    with pytest.raises(ProbeError) as caught:
        OPENAI.read_inventory(given)
    assert caught.value.finding_code == finding
    assert str(caught.value).isprintable()


@given(st.binary(max_size=100), st.sampled_from((200, 401, 404, 500)))
def test_no_answer_crashes_the_inventory(body: bytes, status: int) -> None:
    try:
        OPENAI.read_inventory(dict.fromkeys(OPENAI.probe_calls(), (status, body)))
    except ProbeError as error:
        assert str(error).isprintable()


def test_a_duration_that_rounds_to_zero_seconds_gives_no_rate() -> None:
    counters = openai.parse_counters({"usage": {"completion_tokens": 0}, "timings": {"predicted_ms": 5e-324}})
    assert counters is not None
    assert counters.tokens_per_s is None
