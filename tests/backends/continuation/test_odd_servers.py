"""Servers whose frames differ from those of vLLM and Ollama: no cut answer is taken for a whole one, or said twice."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpumesh.backends.continuation.continuation import Continuation
from gpumesh.backends.continuation.ending import Ending
from gpumesh.backends.continuation.event_streams import DONE
from gpumesh.topology import BackendKind

CHAT, NATIVE = "/v1/chat/completions", "/api/chat"


def start(path: str = CHAT, **request: Any) -> Continuation:
    messages = [{"role": "user", "content": "x"}]
    body = {"model": "m", "messages": messages, "stream": True, **request}
    return Continuation(path, json.dumps(body).encode(), clock=lambda: 1.0)


def event(choice: dict[str, Any], **members: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, **choice}], **members}).encode() + b"\n\n"


def said(text: str, reason: str | None = None) -> bytes:
    return event({"delta": {"content": text}, "finish_reason": reason})


def test_an_empty_finish_reason_does_not_end_a_choice() -> None:
    """Some servers, LocalAI among them, send it in each chunk."""
    answer = start()
    for text in "abc":
        assert answer.feed(said(text, ""))
    assert answer.handle_cut("connection lost") is None, "another node may continue it"


def test_a_server_that_gives_only_empty_reasons_may_end_its_stream() -> None:
    answer = start()
    for text in "abc":
        answer.feed(said(text, ""))
    assert answer.feed(DONE) == DONE
    assert answer.finished


@pytest.mark.parametrize("reason", ["abort", "error", "cancelled"])
def test_a_reason_that_tells_of_a_failure_is_a_cut(reason: str) -> None:
    """vLLM and SGLang end the answers so that they give up, with status 200."""
    answer = start()
    assert answer.feed(said("a"))
    assert answer.feed(said("", reason) + DONE) == b""
    assert not answer.finished
    assert answer.cut_reason is not None
    assert reason in answer.cut_reason


OTHER_CONTENT: dict[str, dict[str, Any]] = {
    "a list of parts": {"delta": {"content": [{"type": "text", "text": "a"}]}},
    "a refusal": {"delta": {"refusal": "no"}},
    "thinking under another name": {"delta": {"reasoning_details": [{"text": "a"}]}},
    "audio": {"delta": {"audio": {"data": "AAAA"}}},
    "a message": {"message": {"role": "assistant", "content": "a"}},
    "a text": {"text": "a"},
}


@pytest.mark.parametrize("choice", OTHER_CONTENT.values(), ids=OTHER_CONTENT.keys())
@pytest.mark.parametrize("before", [b"", said("x"), said("x") + said("y")], ids=["alone", "after text", "unread"])
def test_what_is_no_text_is_not_begun_anew(choice: dict[str, Any], before: bytes) -> None:
    """Another server would send the client the same once more."""
    answer = start()
    frames = event(choice)
    for data in filter(None, (before, frames, frames)):
        assert answer.feed(data), "it is content, so it is not held"
    ending = answer.handle_cut("connection lost")
    assert isinstance(ending, Ending)
    assert "it holds more than text" in (ending.error or "")


def test_text_after_other_thinking_is_continued() -> None:
    answer = start()
    answer.feed(event(OTHER_CONTENT["thinking under another name"]))
    answer.feed(said("a") + said("b"))
    assert answer.handle_cut("connection lost") is None


def test_generated_images_are_not_begun_anew() -> None:
    answer = start(NATIVE)
    line = json.dumps({"message": {"role": "assistant", "content": "", "images": ["AAAA"]}, "done": False}).encode()
    assert answer.feed(line + b"\n")
    ending = answer.handle_cut("connection lost")
    assert ending is not None
    assert "it holds more than text" in (ending.error or "")


@pytest.mark.parametrize(
    "member",
    ["structured_outputs", "guided_choice", "guided_grammar", "ebnf", "regex", "top_logprobs", "prompt_logprobs"],
)
def test_an_answer_with_a_form_is_not_continued(member: str) -> None:
    answer = start(CHAT, **{member: {"a": 1}})
    answer.feed(said("a"))
    ending = answer.handle_cut("connection lost")
    assert ending is not None
    assert f"an answer with `{member}` cannot be continued" in (ending.error or "")


def continue_marked(answer: Continuation) -> dict[str, Any]:
    """The request to a vLLM that continues marked messages."""
    assert answer.handle_cut("connection lost") is None
    replies = iter((10, 12))
    while answer.next_question("n", BackendKind.VLLM) is not None:
        usage = {"prompt_tokens": next(replies), "completion_tokens": 1}
        answer.apply_reply(200, event({"delta": {"content": "z"}, "finish_reason": "length"}, usage=usage) + DONE)
    call = answer.next_call("n", BackendKind.VLLM)
    assert call is not None
    assert not isinstance(call, Ending)
    request: dict[str, Any] = json.loads(call.body)
    return request


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens", "n_predict"])
def test_tokens_that_the_server_counts_are_spent(limit: str) -> None:
    """A server may send several tokens in a frame; then only its own count tells how many."""
    answer = start(CHAT, **{limit: 40})
    for count in (3, 6, 9):
        usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}
        answer.feed(event({"delta": {"content": "a b c"}, "finish_reason": None}, usage=usage))
    assert continue_marked(answer)[limit] == 31
    answer.feed(said("d"))
    usage = {"prompt_tokens": 20, "completion_tokens": 1, "total_tokens": 21}
    data = answer.feed(said("", "stop") + b'data: {"choices": [], "usage": ' + json.dumps(usage).encode() + b"}\n\n")
    figures = json.loads(data.split(b"data: ")[-1])["usage"]
    assert figures == {"prompt_tokens": 11, "completion_tokens": 10, "total_tokens": 21}


def test_a_count_above_the_bytes_of_the_text_is_not_believed() -> None:
    answer = start(max_tokens=40)
    answer.feed(event({"delta": {"content": "ab"}}, usage={"prompt_tokens": 7, "completion_tokens": 1000}))
    assert continue_marked(answer)["max_tokens"] == 38


def typed(kind: str, **members: Any) -> bytes:
    return f"event: {kind}\n".encode() + b"data: " + json.dumps({"type": kind, **members}).encode() + b"\n\n"


FAILURES = {
    "OpenAI's error": typed("error", code="server_error", message="boom", param=None),
    "a failed response": typed("response.failed", response={"status": "failed", "error": {"message": "boom"}}),
    "Anthropic's error": typed("error", error={"type": "overloaded_error", "message": "boom"}),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("has_begun", [False, True])
def test_an_event_may_report_a_failure(failure: bytes, has_begun: bool) -> None:
    """Before the first token another server is asked; later the client gets one error, in its own dialect."""
    answer = start("/v1/responses")
    answer.feed(typed("response.created", response={"error": None}))
    if has_begun:
        assert answer.feed(typed("response.output_text.delta", delta="a"))
    assert answer.feed(failure) == b""
    assert (answer.cut_reason, answer.finished) == ("boom", False)
    if has_begun:
        ending = answer.handle_cut()
        assert ending is not None
        assert "the answer was cut (boom)" in (ending.error or "")


def test_a_message_of_anthropic_is_complete_with_its_stop_reason() -> None:
    answer = start("/v1/messages")
    answer.feed(typed("content_block_delta", delta={"type": "text_delta", "text": "a"}))
    cut = start("/v1/messages")
    cut.feed(typed("content_block_delta", delta={"type": "text_delta", "text": "a"}))
    answer.feed(typed("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3}))
    assert not answer.finished
    assert answer.handle_cut("connection lost") == Ending(typed("message_stop").replace(b'": "', b'":"'))
    ending = cut.handle_cut("connection lost")
    assert ending is not None
    assert ending.error


@pytest.mark.parametrize("value", [None, "", {}, False])
def test_an_empty_error_is_none(value: Any) -> None:
    answer = start()
    assert answer.feed(event({"delta": {"content": "a"}}, error=value))
    assert answer.cut_reason is None


@pytest.mark.parametrize("last", [{"Role": "assistant", "CONTENT": " a"}, {"role": "Assistant", "content": " a"}])
def test_ollama_reads_messages_without_case(last: dict[str, str]) -> None:
    """The client began the answer: it is not another message of the assistant."""
    answer = start(NATIVE, messages=[{"Role": "user", "Content": "x"}, last])
    answer.feed(b'{"message":{"content":" b"},"done":false}\n')
    assert answer.handle_cut("connection lost") is None
    question = answer.next_question("n", BackendKind.OLLAMA)
    assert question is not None
    messages = json.loads(question.body)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[-1]["content"].startswith(" a")
