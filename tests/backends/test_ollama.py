from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends.base import ChatRequest, Chunk, Message, ServerCounters
from gpumesh.backends.ollama import OllamaDialect, OllamaFrameReader, parse_counters
from gpumesh.errors import BackendError, ProbeError, StreamCut
from tests.backends.test_frames import pieces

OLLAMA = OllamaDialect()
FINAL = {
    "model": "qwen2.5:7b",
    "created_at": "2026-11-24T04:10:00.123456789Z",
    "message": {"role": "assistant", "content": ""},
    "done": True,
    "done_reason": "stop",
    "total_duration": 5_000_000_000,
    "load_duration": 1_000_000_000,
    "prompt_eval_count": 26,
    "prompt_eval_duration": 500_000_000,
    "eval_count": 298,
    "eval_duration": 3_000_000_000,
}


def line(**frame: Any) -> bytes:
    return json.dumps(frame, ensure_ascii=False).encode() + b"\n"


def chat(content: str, **more: Any) -> bytes:
    return line(message={"role": "assistant", "content": content, **more}, done=False)


ANSWER = chat("Hé", thinking="hm") + chat("") + chat("llo 日本") + line(**FINAL)


def read(data: bytes, places: Sequence[int] = ()) -> list[Chunk]:
    reader = OllamaFrameReader()
    chunks = [chunk for piece in pieces(data, list(places)) for chunk in reader.feed(piece)]
    return [*chunks, *reader.close()]


# -- requests --------------------------------------------------------------------------------------------------------


def test_a_chat_as_it_is_sent() -> None:
    messages = (Message("system", "Be brief."), Message("user", "What is this? é", images=("aGk=",)))
    call = OLLAMA.build_chat_call(ChatRequest("qwen2.5:7b", messages, {"temperature": 0, "num_ctx": 8192}, think=False))
    assert (call.method, call.path) == ("POST", "/api/chat")
    assert json.loads(call.body) == {
        "model": "qwen2.5:7b",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is this? é", "images": ["aGk="]},
        ],
        "stream": True,
        "options": {"temperature": 0, "num_ctx": 8192},
        "think": False,
    }


def test_what_is_not_said_is_not_sent() -> None:
    body = json.loads(OLLAMA.build_chat_call(ChatRequest("m", (Message("user", "x"),), stream=False)).body)
    assert body == {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": False}


@pytest.mark.parametrize("think", [True, False, "low", "high"])
def test_think_is_sent_as_it_is(think: bool | str) -> None:
    assert json.loads(OLLAMA.build_chat_call(ChatRequest("m", (), think=think)).body)["think"] == think


# -- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_cut_at_every_byte() -> None:
    whole = read(ANSWER)
    assert whole[:-1] == [Chunk("Hé", "hm"), Chunk("llo 日本")]
    assert whole[-1] == Chunk(done=True, done_reason="stop", counters=parse_counters(FINAL))
    for place in range(len(ANSWER) + 1):
        assert read(ANSWER, [place]) == whole
    assert read(ANSWER, range(len(ANSWER))) == whole, "byte by byte"


def test_an_answer_that_stops_at_any_byte_is_cut_and_never_complete() -> None:
    """Half of a frame gives no chunk; only when all of the final one is there is it an answer."""
    for place in range(len(ANSWER) - 1):
        reader = OllamaFrameReader()
        chunks = list(reader.feed(ANSWER[:place]))
        assert not any(chunk.done for chunk in chunks)
        with pytest.raises(StreamCut):
            reader.close()
    assert read(ANSWER[:-1])[-1].done, "the last line's end may be missing"


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (line(response="ab", done=False), "ab"),
        (line(message={"content": "ab"}, done=False), "ab"),
        (line(message={"content": "ab"}, response="zz", done=False), "ab"),
        (line(response=5, done=False) + line(response="ab"), "ab"),
        (line(message={"content": None, "tool_calls": []}) + line(message={"content": "ab"}), "ab"),
        (b"\n\r\n" + line(response="ab") + b"\n", "ab"),
    ],
)
def test_frames_of_both_routes(frame: bytes, text: str) -> None:
    assert "".join(chunk.text for chunk in read(frame + line(**FINAL))) == text


def test_an_answer_in_one_piece() -> None:
    (chunk,) = read(line(**{**FINAL, "message": {"role": "assistant", "content": "whole"}}).rstrip())
    assert (chunk.text, chunk.done, chunk.counters) == ("whole", True, parse_counters(FINAL))


def test_what_comes_after_the_final_frame_is_passed_over() -> None:
    assert read(ANSWER + b"nonsense\n" + line(error="late")) == read(ANSWER)


def test_an_error_in_mid_answer_comes_after_what_was_said() -> None:
    reader = OllamaFrameReader()
    data = chat("some") + line(error="model runner has unexpectedly stopped, \x1b[31mred") + chat("more")
    assert reader.feed(data) == [Chunk("some")]
    with pytest.raises(BackendError, match="unexpectedly stopped, red"):
        reader.feed(b"")
    with pytest.raises(BackendError, match="unexpectedly stopped, red"):
        reader.close()


@pytest.mark.parametrize("data", [b"<html>\n", b"[1]\n", b"5\n", b"data: {}\n"])
def test_what_is_no_frame(data: bytes) -> None:
    with pytest.raises(ProbeError) as caught:
        OllamaFrameReader().feed(data)
    assert caught.value.finding_code == "wrong-server"


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4))
def test_no_bytes_crash_the_reader(data: bytes, places: list[int]) -> None:
    try:
        assert read(data, places)[-1].done
    except (BackendError, ProbeError) as error:
        assert str(error).isprintable()


FRAME = st.dictionaries(
    st.sampled_from((*FINAL, "error", "response", "thinking")),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just({"content": [1]}),
)


@given(FRAME)
def test_no_frame_crashes_the_reader(frame: dict[str, Any]) -> None:
    try:
        read(json.dumps(frame).encode() + b"\n")
    except (BackendError, ProbeError) as error:
        assert str(error).isprintable()


# -- counters --------------------------------------------------------------------------------------------------------


def test_counters_are_in_milliseconds() -> None:
    found = parse_counters(FINAL)
    assert found == ServerCounters(26, 298, 5000.0, 1000.0, 500.0, 3000.0)
    assert found.tokens_per_s == pytest.approx(99.333, abs=0.001)
    assert found.waited_ms == 500.0


@pytest.mark.parametrize("absent", ["total_duration", "load_duration", "prompt_eval_duration", "eval_duration"])
def test_each_counter_may_be_absent(absent: str) -> None:
    found = parse_counters({key: value for key, value in FINAL.items() if key != absent})
    assert found.prompt_tokens == 26
    assert (found.waited_ms is None) == (absent in ("total_duration", "eval_duration"))
    assert (found.tokens_per_s is None) == (absent == "eval_duration")


def test_counters_that_lie_are_unknown_and_never_negative() -> None:
    found = parse_counters({"eval_count": -5, "eval_duration": "x", "total_duration": 1e400, "prompt_eval_count": True})
    assert found == ServerCounters()
    assert parse_counters({"total_duration": 5, "eval_duration": 10}).waited_ms == 0.0
    absurd = parse_counters({"total_duration": 2_000_000_000, "eval_duration": 1, "eval_count": 64})
    assert absurd.waited_ms is None, "64 billion tokens/s: the generation would count as a wait"
    single = parse_counters({"total_duration": 2_000_000_000, "eval_duration": 0, "eval_count": 1})
    assert single.waited_ms == 2000.0
    assert parse_counters({"eval_count": 5, "eval_duration": 0}).tokens_per_s is None


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (403, b"", "HTTP 403 without a word: Ollama does not allow this Host or Origin"),
        (403, b'{"error":"forbidden"}', "forbidden"),
        (404, b'{"error":"model \'x\' not found"}', "model 'x' not found"),
        (
            503,
            b'{"error":"server busy, please try again.  maximum pending requests exceeded"}',
            "server busy, please try again. maximum pending requests exceeded",
        ),
        (500, b'{"error":"model runner has unexpectedly stopped"}', "model runner has unexpectedly stopped"),
        (401, b'{"error":"unauthorized","signin_url":"https://ollama.com/x"}', "unauthorized"),
    ],
)
def test_errors_in_its_own_words(status: int, body: bytes, said: str) -> None:
    assert OLLAMA.error_text(status, body) == said


# -- inventory -------------------------------------------------------------------------------------------------------

TAGS = {
    "models": [
        {
            "name": "qwen2.5:7b",
            "model": "qwen2.5:7b",
            "modified_at": "2026-08-01T12:00:00.123456789+02:00",
            "size": 4683087332,
            "digest": "845dbda0ea48",
            "details": {"family": "qwen2", "parameter_size": "7.6B", "quantization_level": "Q4_K_M"},
        },
        {"model": "only-model:latest"},
    ]
}
PS = {
    "models": [
        {
            "name": "qwen2.5:7b",
            "size": 6 << 30,
            "size_vram": 3 << 30,
            "expires_at": "2026-11-24T04:15:00.5Z",
            "context_length": 4096,
        }
    ]
}


def answers(**changes: tuple[int, Any] | None) -> dict[str, tuple[int, bytes] | None]:
    given: dict[str, tuple[int, Any] | None] = {
        "version": (200, {"version": "0.12.6"}),
        "tags": (200, TAGS),
        "ps": (200, PS),
        **changes,
    }
    return {
        name: None if one is None else (one[0], one[1] if isinstance(one[1], bytes) else json.dumps(one[1]).encode())
        for name, one in given.items()
    }


def test_inventory() -> None:
    assert {name: call.path for name, call in OLLAMA.probe_calls().items()} == {
        "version": "/api/version",
        "tags": "/api/tags",
        "ps": "/api/ps",
    }
    found = OLLAMA.read_inventory(answers())
    first, second = found.catalog
    assert (found.version, first.name, second.name) == ("0.12.6", "qwen2.5:7b", "only-model:latest")
    assert first.modified_at == "2026-08-01T12:00:00.123456789+02:00", "its nanoseconds are a fingerprint"
    assert (first.size_mib, first.parameter_size, first.quantization, first.family) == (4466, "7.6B", "Q4_K_M", "qwen2")
    (loaded,) = found.loaded
    assert (loaded.size_mib, loaded.size_vram_mib, loaded.context_length) == (6144, 3072, 4096)
    assert loaded.expires_at == datetime(2026, 11, 24, 4, 15, 0, 500000, UTC)


@pytest.mark.parametrize("ps", [None, (404, b""), (200, b"nonsense"), (200, []), (500, b"x")])
def test_inventory_without_ps(ps: tuple[int, Any] | None) -> None:
    assert OLLAMA.read_inventory(answers(ps=ps)).loaded == ()


@pytest.mark.parametrize("models", [None, [], [None, 5, {"name": 5}, {"name": "\x1b[2J"}], [{"details": "x"}]])
def test_a_list_of_models_that_is_none_is_empty(models: Any) -> None:
    assert OLLAMA.read_inventory(answers(tags=(200, {"models": models}))).catalog == ()


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"version": None}, "backend-down"),
        ({"tags": (403, b"")}, "host-refused"),
        ({"tags": (403, {"error": "no"})}, "key-refused"),
        ({"tags": (401, b"")}, "key-refused"),
        ({"tags": (429, b"")}, "backend-down"),
        ({"version": (502, b"<html>")}, "backend-down"),
        ({"version": (404, {"error": {"message": "x"}})}, "wrong-server"),
        ({"version": (200, {"object": "list"})}, "wrong-server"),
        ({"version": (200, b"")}, "wrong-server"),
        ({"tags": (200, {"data": []})}, "wrong-server"),
        ({"tags": (301, b"")}, "wrong-server"),
        ({"tags": (200, {"models": {}})}, "wrong-server"),
        ({"tags": (200, b' {"models":[{"name":"qwen')}, "answer-broken"),
        ({"tags": (404, b'{"models":[{"name":"qwen')}, "wrong-server"),
        ({"tags": (200, {"models": [{"name": "m"}] * 10_001})}, "models-too-many"),
    ],
)
def test_answers_that_are_not_ollamas(changes: dict[str, Any], finding: str) -> None:
    with pytest.raises(ProbeError) as caught:
        OLLAMA.read_inventory(answers(**changes))
    assert caught.value.finding_code == finding
    assert str(caught.value).isprintable()


@given(st.binary(max_size=100), st.sampled_from((200, 403, 404, 500)))
def test_no_answer_crashes_the_inventory(body: bytes, status: int) -> None:
    try:
        OLLAMA.read_inventory({"version": (status, body), "tags": (status, body), "ps": (status, body)})
    except ProbeError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize(
    "figures",
    [
        {"eval_count": 64_000_000, "eval_duration": 1_000_000_000},
        {"eval_count": 10**400, "eval_duration": 1},
        {"eval_count": 100, "eval_duration": 1e-300},
        {"eval_count": 100, "eval_duration": 5e-324},
        {"eval_count": 100, "eval_duration": -1},
        {"eval_count": 100, "eval_duration": 0},
        {"eval_count": 100, "eval_duration": float("nan")},
        {"eval_count": 100, "eval_duration": float("inf")},
        {"eval_count": 100, "eval_duration": 1e308},
        {"eval_count": 100, "eval_duration": "1000000"},
        {"eval_count": True, "eval_duration": True},
        {"eval_count": -5, "eval_duration": 1_000_000},
    ],
)
def test_figures_that_no_hardware_reaches_are_none(figures: dict[str, Any]) -> None:
    read = parse_counters({**figures, "total_duration": figures["eval_duration"], "load_duration": 1e308})
    assert read.tokens_per_s is None
    assert read.load_ms is None
    assert read.waited_ms is None or math.isfinite(read.waited_ms)
