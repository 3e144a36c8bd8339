"""An answer in one piece: whether it is one, and whole, shown by the body itself."""

from __future__ import annotations

import json

import pytest

from gpumesh.backends.continuation.whole_answers import find_failed_reason, find_text_problem, is_cut_short

CHAT, NATIVE = "/v1/chat/completions", "/api/chat"
ANSWER = json.dumps({"choices": [{"message": {"content": "}"}, "finish_reason": "stop"}]}).encode()
LINES = b'{"message":{"content":"a"},"done":false}\n{"message":{"content":"b"},"done":false}\n'
EVENTS = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'


@pytest.mark.parametrize(
    "body", [ANSWER, b"  " + ANSWER + b"\r\n", b"\xef\xbb\xbf" + ANSWER, b'{"a":NaN}', b'{"a":"\\ud83d"}']
)
def test_a_whole_object_is_an_answer(body: bytes) -> None:
    assert find_text_problem(CHAT, 200, body) is None
    assert not is_cut_short(CHAT, body)


@pytest.mark.parametrize("end", range(1, len(ANSWER)))
def test_each_beginning_of_an_object_is_cut_short(end: int) -> None:
    assert is_cut_short(CHAT, ANSWER[:end])
    assert is_cut_short("/v1/embeddings", ANSWER[:end])


@pytest.mark.parametrize("body", [b"null", b"[]", b"{}", b" {} \n", b'"no"', b"ok", b"upstream error"])
def test_what_is_no_object_is_no_answer_to_a_prompt(body: bytes) -> None:
    assert "as no inference server does" in (find_text_problem(NATIVE, 200, body) or "")
    assert find_text_problem("/v1/audio/transcriptions", 200, body) is None


@pytest.mark.parametrize("status", [202, 205, 206])
def test_a_status_may_say_that_it_is_no_whole_answer(status: int) -> None:
    assert find_text_problem(CHAT, status, ANSWER) is not None
    assert find_text_problem(CHAT, 201, ANSWER) is None


@pytest.mark.parametrize(
    ("path", "body", "whole"),
    [
        (NATIVE, LINES, False),
        (NATIVE, LINES + b'{"done":true}', True),
        (NATIVE, LINES + b'{"done":true}\n\n\n', True),
        (NATIVE, LINES + b'{"done":tr', False),
        (CHAT, EVENTS, False),
        (CHAT, EVENTS + b"data: [DONE]\n\n", True),
        (CHAT, EVENTS + b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}', True),
        (CHAT, b": a comment\n\n" + EVENTS, False),
    ],
)
def test_a_stream_under_another_type_needs_its_end(path: str, body: bytes, whole: bool) -> None:
    assert find_text_problem(path, 200, body) is None
    assert is_cut_short(path, body) is not whole


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_reason_may_tell_of_a_failure(reason: str) -> None:
    body = json.dumps({"choices": [{"message": {"content": "a"}, "finish_reason": reason}]}).encode()
    assert reason in (find_failed_reason(body) or "")
    assert find_failed_reason(ANSWER) is None
    in_text = json.dumps({"choices": [{"message": {"content": '"finish_reason": "abort"'}}]}).encode()
    assert find_failed_reason(in_text) is None
