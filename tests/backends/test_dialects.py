from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends import ollama
from gpumesh.backends.base import ServerCounters
from gpumesh.backends.dialects import DIALECTS, find_counters, host_header
from gpumesh.topology import BackendKind, Target


def test_each_kind_has_a_dialect() -> None:
    assert set(DIALECTS) == set(BackendKind) - {BackendKind.AUTO}


NATIVE = {"done": True, "eval_count": 5, "eval_duration": 1_000_000}
USAGE = {"usage": {"prompt_tokens": 2, "completion_tokens": 5}}


def sse(*documents: Any) -> bytes:
    return b"".join(b"event: x\ndata: " + json.dumps(document).encode() + b"\n\n" for document in documents)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (json.dumps(NATIVE).encode(), ServerCounters(tokens=5, eval_ms=1.0)),
        (json.dumps({"total_duration": 3_000_000}).encode(), ServerCounters(total_ms=3.0)),
        (json.dumps({"message": {"content": "x"}}).encode() + b"\n" + json.dumps(NATIVE).encode() + b"\n",
         ServerCounters(tokens=5, eval_ms=1.0)),
        (json.dumps(USAGE).encode(), ServerCounters(2, 5)),
        (sse({"choices": []}, USAGE) + b"data: [DONE]\n\n", ServerCounters(2, 5)),
        (sse({"type": "response.completed", "response": {"usage": {"input_tokens": 2, "output_tokens": 5}}}),
         ServerCounters(2, 5)),
        (sse({"type": "message_start",
              "message": {"usage": {"input_tokens": 2, "cache_read_input_tokens": 7, "output_tokens": 5}}}),
         ServerCounters(9, 5, cached_tokens=7)),
        (sse({"type": "message_start", "message": {"usage": {"input_tokens": 2, "output_tokens": 5}}}),
         ServerCounters(2, 5)),
        (sse({"type": "message_delta", "usage": {"output_tokens": 5}}), ServerCounters(tokens=5)),
        (b'{"choices":[]}', None),
        (b"", None),
        (b"nonsense\nmore", None),
        (b"[1]", None),
        (b'{"response": 5, "message": "x"}', None),
    ],
)  # fmt: skip
def test_counters_of_any_answer(body: bytes, found: ServerCounters | None) -> None:
    assert find_counters(body) == found


DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
FIGURES = (*DURATIONS, "prompt_eval_count", "eval_count")


@given(
    st.dictionaries(
        st.sampled_from((*FIGURES, "done", "response", "model")),
        st.one_of(
            st.integers(-2, 10**7),
            st.integers(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.none(),
            st.booleans(),
            st.text(max_size=3),
            st.lists(st.integers(), max_size=2),
        ),
    )
)
def test_the_fast_way_to_the_counters_of_ollama_finds_what_the_slow_one_does(frame: dict[str, Any]) -> None:
    fast = ollama.find_usual_counters(json.dumps(frame).encode())
    slow = ollama.parse_counters(frame)
    assert fast in (None, slow)
    ordinary = {name: value for name, value in frame.items() if name in FIGURES and type(value) is int}
    if "total_duration" in ordinary and all(0 <= value <= 10**7 for value in ordinary.values()):
        assert ollama.find_usual_counters(json.dumps(ordinary).encode()) == ollama.parse_counters(ordinary)


@given(st.binary(max_size=300))
def test_no_body_crashes(body: bytes) -> None:
    find_counters(body)


@pytest.mark.parametrize(
    ("target", "host"),
    [
        (Target("127.0.0.1", 11434), "127.0.0.1:11434"),
        (Target("localhost", 80), "127.0.0.1:80"),
        (Target("LOCALHOST", 80), "127.0.0.1:80"),
        (Target("::1", 11434), "127.0.0.1:11434"),
        (Target("127.8.9.1", 1), "127.0.0.1:1"),
        (Target("10.0.0.5", 11434), "10.0.0.5:11434"),
        (Target("fe80::1", 11434), "[fe80::1]:11434"),
        (Target("box.local", 443, "https"), "box.local:443"),
    ],
)
def test_the_host_header_is_what_the_server_calls_itself(target: Target, host: str) -> None:
    assert host_header(target) == host
