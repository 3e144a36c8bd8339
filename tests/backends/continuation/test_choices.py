"""An answer is complete when each of its choices, and each of its items, is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpumesh.backends.continuation.continuation import Continuation
from gpumesh.backends.continuation.ending import Ending
from gpumesh.backends.continuation.event_streams import DONE

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATHS = pytest.mark.parametrize("path", [CHAT, TEXT])


def piece(path: str, index: int, text: str, reason: str | None = None) -> bytes:
    """An event with a text of one choice."""
    said = {"delta": {"content": text}} if path == CHAT else {"text": text}
    return b"data: " + json.dumps({"choices": [{"index": index, **said, "finish_reason": reason}]}).encode() + b"\n\n"


def start(path: str, **request: Any) -> Continuation:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {"prompt": "x"}
    return Continuation(path, json.dumps({"model": "m", **prompt, **request}).encode(), clock=lambda: 1.0)


@PATHS
def test_an_end_after_half_of_a_choice_is_a_cut(path: str) -> None:
    answer = start(path, n=2)
    data = answer.feed(piece(path, 0, "a") + piece(path, 1, "b"))
    data += answer.feed(piece(path, 0, "", "stop")) + answer.feed(piece(path, 1, "c"))
    assert data.count(b"data:") == 4
    assert answer.feed(DONE) == b""
    assert not answer.finished
    assert answer.cut_reason == "the stream ended without a reason to"
    ending = answer.handle_cut()
    assert ending is not None
    assert "cannot be continued" in (ending.error or "")


@PATHS
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_answer_ends_after_the_last_of_its_choices(path: str, order: tuple[int, int]) -> None:
    answer = start(path, n=2)
    answer.feed(piece(path, 1, "b") + piece(path, 0, "a"))
    for index in order:
        answer.feed(piece(path, index, "", "stop"))
    assert answer.feed(DONE) == DONE
    assert answer.finished


@PATHS
@pytest.mark.parametrize(
    ("request_members", "finished", "complete"),
    [
        ({}, [0], True),
        ({"n": 1}, [0], True),
        ({"n": 2}, [0], False),
        ({"n": 2}, [1], False),
        ({"n": 2}, [0, 1], True),
        ({"n": 3}, [0, 1], False),
    ],
)
def test_a_stream_that_breaks_off_is_complete_if_all_choices_are(
    path: str, request_members: dict[str, Any], finished: list[int], complete: bool
) -> None:
    answer = start(path, **request_members)
    for index in finished:
        answer.feed(piece(path, index, "a") + piece(path, index, "", "stop"))
    ending = answer.handle_cut("connection lost")
    if complete:
        assert ending == Ending(DONE)
    else:
        assert ending is not None
        assert "cannot be continued" in (ending.error or "")


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [("x", 1), (["x"], 1), (["x", "y"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2), ([], 1), (None, 1)],
)
def test_each_prompt_of_a_list_has_its_choices(prompt: Any, choices: int) -> None:
    for n in (1, 2):
        answer = start(TEXT, prompt=prompt, n=n)
        for index in range(choices * n):
            answer.feed(piece(TEXT, index, "a", "stop"))
            if index < choices * n - 1:
                assert answer._planner.is_missing_choices(answer._received)
        assert answer.handle_cut("connection lost") == Ending(DONE)


def test_choices_that_nobody_asked_for_are_not_mixed_into_one_answer() -> None:
    answer = start(CHAT)
    answer.feed(piece(CHAT, 0, "a"))
    assert answer.continuable
    answer.feed(piece(CHAT, 1, "b"))
    assert not answer.continuable
    ending = answer.handle_cut()
    assert ending is not None
    assert "several answers" in (ending.error or "")


def test_a_text_that_speaks_of_an_index_is_a_text() -> None:
    answer = start(CHAT)
    frame = piece(CHAT, 0, '"index":1, "index": 2')
    answer.feed(frame)
    assert answer.feed(frame) is frame, "it is passed on unread"
    assert answer.continuable


@pytest.mark.parametrize(
    ("path", "events"),
    [
        (
            "/v1/responses",
            [b'{"type":"response.output_text.delta","delta":"x"}', b'{"type":"response.output_item.done"}'],
        ),
        ("/v1/messages", [b'{"type":"content_block_delta","index":0}', b'{"type":"content_block_stop","index":0}']),
    ],
)
def test_an_end_before_the_last_item_of_a_response_is_a_cut(path: str, events: list[bytes]) -> None:
    answer = Continuation(path, b"{}", clock=lambda: 1.0)
    for event in events:
        assert answer.feed(b"data: " + event + b"\n\n")
    assert answer.feed(DONE) == b""
    assert answer.cut_reason is not None
    ending = answer.handle_cut()
    assert ending is not None
    assert ending.error is not None


@pytest.mark.parametrize("calls", [1, 2])
def test_a_stream_with_tool_calls_is_complete_with_its_reason_to_finish(calls: int) -> None:
    answer = start(CHAT)
    for index in range(calls):
        delta = {"tool_calls": [{"index": index, "function": {"name": "f", "arguments": "{"}}]}
        answer.feed(b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n")
    assert not answer.continuable
    assert answer.feed(DONE) == b""
    assert answer.cut_reason is not None
    ending = answer.handle_cut()
    assert ending is not None
    assert "it calls tools" in (ending.error or "")
