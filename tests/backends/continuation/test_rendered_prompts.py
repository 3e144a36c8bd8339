"""How a chat is continued by llama-server: the prompt that it renders, and what its ``/completion`` sends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpumesh.backends.base import HttpCall, ServerCounters
from gpumesh.backends.continuation.continuation import Continuation
from gpumesh.backends.continuation.ending import Ending
from gpumesh.backends.continuation.planner import ContinuationStrategies
from gpumesh.backends.continuation.rendered_prompts import CompletionAsChatFormat, RenderedPromptFormat
from gpumesh.backends.continuation.stream_format import SENTINEL, PartialAnswer
from gpumesh.topology import BackendKind

PATH = "/v1/chat/completions"
FORM = RenderedPromptFormat(PATH)
LLAMACPP = BackendKind.LLAMACPP
REQUEST: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Why?"}],
    "temperature": 0,
    "stop": "END",
    "max_tokens": 10,
    "stream": True,
    "stream_options": {"include_usage": True},
}
PROMPT = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


def chunk(text: str | None, reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": reason}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "tiny"}
    return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"


def piece(text: str) -> bytes:
    return b"data: " + json.dumps({"index": 0, "content": text, "stop": False}).encode() + b"\n\n"


def last_piece(stop_type: str = "limit") -> bytes:
    timings = {"prompt_n": 4, "cache_n": 8, "prompt_ms": 2.0, "predicted_n": 2, "predicted_ms": 20.0}
    document = {"content": "", "stop": True, "stop_type": stop_type, "tokens_evaluated": 12, "tokens_predicted": 2}
    return b"data: " + json.dumps({**document, "timings": timings}).encode() + b"\n\n"


def cut_after(texts: list[str], request: dict[str, Any] = REQUEST) -> Continuation:
    answer = Continuation(PATH, json.dumps(request).encode(), clock=lambda: 1.0)
    for text in texts:
        answer.feed(chunk(text))
    assert answer.handle_cut() is None
    return answer


def continue_with(answer: Continuation, prompt: bytes | None, status: int = 200) -> HttpCall | Ending | None:
    question = answer.next_question("n", LLAMACPP)
    assert question is not None
    assert question.path == "/apply-template"
    if prompt is not None:
        answer.apply_reply(status, prompt)
    return answer.next_call("n", LLAMACPP)


def ask_about_message(answer: Continuation) -> HttpCall | Ending | None:
    """Answers the questions about a last message of the assistant as build 10434 does, and takes the next call."""
    for said in ("x", SENTINEL + "x"):
        question = answer.next_question("n", LLAMACPP)
        assert question is not None
        assert question.path == PATH
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        figures = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
        answer.apply_reply(200, chunk(said) + chunk(None, "length") + figures + b"data: [DONE]\n\n")
    assert answer.next_question("n", LLAMACPP) is None
    return answer.next_call("n", LLAMACPP)


def documents(data: bytes) -> list[Any]:
    lines = [line.removeprefix(b"data: ") for line in data.splitlines() if line]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_rendered_prompt_and_the_text_so_far_are_continued() -> None:
    answer = cut_after(["The ", "sky"])
    step = continue_with(answer, json.dumps({"prompt": PROMPT}).encode())
    assert isinstance(step, HttpCall)
    body = json.loads(step.body)
    assert step.path == "/completion"
    assert body == {
        "model": "tiny",
        "temperature": 0,
        "stop": ["END"],
        "stream": True,
        "prompt": PROMPT + "The sky",
        "n_predict": 8,
    }


def test_its_stream_becomes_the_rest_of_the_chat() -> None:
    answer = cut_after(["The ", "sky"])
    continue_with(answer, json.dumps({"prompt": PROMPT}).encode())
    out = answer.feed(piece(" is") + piece(" blue")) + answer.feed(last_piece())
    first, second, finish, usage = documents(out)
    assert [document["choices"][0]["delta"]["content"] for document in (first, second)] == [" is", " blue"]
    assert {document["id"] for document in (first, second, finish, usage)} == {"chatcmpl-1"}
    assert finish["choices"][0]["finish_reason"] == "length"
    assert usage["usage"] == {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
    assert usage["timings"]["predicted_n"] == 4
    assert usage["gpumesh"] == {"continued": 1, "tokens_before": 2}
    assert answer.finished
    assert (answer.text, answer.tokens) == ("The sky is blue", 4)
    assert answer.counters == ServerCounters(prompt_tokens=12, tokens=2, prompt_ms=2.0, eval_ms=20.0, cached_tokens=8)


def test_a_second_cut_is_continued_from_all_that_came() -> None:
    answer = cut_after(["The ", "sky"])
    continue_with(answer, json.dumps({"prompt": PROMPT}).encode())
    answer.feed(piece(" is"))
    assert answer.handle_cut() is None
    assert answer.next_question("n", LLAMACPP) is None
    step = answer.next_call("n", LLAMACPP)
    assert isinstance(step, HttpCall)
    assert json.loads(step.body)["prompt"] == PROMPT + "The sky is"
    assert json.loads(step.body)["n_predict"] == 7


def test_the_prompt_of_another_kind_of_server_is_not_used() -> None:
    strategies: ContinuationStrategies = {}
    answer = Continuation(PATH, json.dumps(REQUEST).encode(), clock=lambda: 1.0, strategies=strategies)
    answer.feed(chunk("The "))
    assert answer.handle_cut() is None
    continue_with(answer, json.dumps({"prompt": PROMPT}).encode())
    answer.feed(piece("sky"))
    assert answer.handle_cut() is None
    question = answer.next_question("other", BackendKind.OLLAMA)
    assert question is not None
    assert question.path == "/api/chat"


@pytest.mark.parametrize(
    "answered",
    [
        (404, b'{"error":{"message":"File Not Found"}}'),
        (200, b'{"prompt": 5}'),
        (200, b"x"),
        (200, json.dumps({"prompt": PROMPT + "<think>\n"}).encode()),
    ],
    ids=["an old build", "no text", "no JSON", "a model that must think first"],
)
def test_without_a_prompt_the_answer_is_a_last_message(answered: tuple[int, bytes]) -> None:
    answer = cut_after(["The "])
    assert continue_with(answer, answered[1], answered[0]) is None  # not before it is known to continue the message
    step = ask_about_message(answer)
    assert isinstance(step, HttpCall)
    body = json.loads(step.body)
    assert step.path == PATH
    assert body["messages"][-1] == {"role": "assistant", "content": "The "}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


def test_an_image_is_no_text_of_a_prompt() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]
    answer = cut_after(["A "], {**REQUEST, "messages": messages})
    step = ask_about_message(answer)
    assert isinstance(step, HttpCall)
    assert step.path == PATH


def test_an_answer_that_the_client_began_is_continued_too() -> None:
    messages = [*REQUEST["messages"], {"role": "assistant", "content": "Because"}]
    step = continue_with(cut_after([" the"], {**REQUEST, "messages": messages}), b'{"prompt": "user: Why? Because"}')
    assert isinstance(step, HttpCall)
    assert json.loads(step.body)["prompt"] == "user: Why? Because the"


def test_a_template_that_closes_the_turn_that_the_client_began_is_seen_by_its_prompt() -> None:
    messages = [*REQUEST["messages"], {"role": "assistant", "content": "Because"}]
    prompt = b'{"prompt": "user: Why? Because<end> assistant: "}'
    step = continue_with(cut_after([" the"], {**REQUEST, "messages": messages}), prompt)
    assert isinstance(step, Ending)
    assert "closes the turn that the client began" in (step.error or "")


def test_nobody_asked_for_usage() -> None:
    form = CompletionAsChatFormat(usage=False)
    out = form.translate(form.read(last_piece("eos")), PartialAnswer())
    finish, figures = documents(out)
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert "usage" not in figures


def test_an_error_in_mid_stream_is_a_cut() -> None:
    answer = cut_after(["The "])
    continue_with(answer, json.dumps({"prompt": PROMPT}).encode())
    assert answer.feed(b'data: {"error":{"message":"slot unavailable","code":503}}\n\n') == b""
    assert answer.cut_reason == "slot unavailable"
