"""How another node goes on: by which strategy, with which budget, and which answers are not continued."""

from __future__ import annotations

import json

import pytest

from gpumesh.backends.base import HttpCall
from gpumesh.backends.continuation.continuation import MAX_CUTS, Continuation, Ending
from gpumesh.backends.continuation.planner import ContinuationStrategies, ContinuationStrategy
from gpumesh.topology import BackendKind
from tests.backends.continuation.driving import OLLAMA, Clock, chunks, continue_on_node, drive, start_answer, text
from tests.backends.models import FORMS, ModelServer, chat, generate, openai, raw


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (chat(options={"num_predict": 6}), "options"),
        (raw(options={"num_predict": 6}), "options"),
        (openai(max_tokens=6), "max_tokens"),
        (openai(max_completion_tokens=6), "max_completion_tokens"),
    ],
)
@pytest.mark.parametrize("continues", [True, False], ids=["continues", "closes"])
def test_the_budget_of_tokens_is_lowered_by_those_already_sent(call: HttpCall, key: str, continues: bool) -> None:
    server = ModelServer(continues=continues, tokens=20)
    frames = server.frames(call)
    for sent in range(1, 6):
        data = drive(start_answer(call), call, server, [len(b"".join(frames[:sent]))])
        assert text(call, data) == text(call, b"".join(frames))
        assert chunks(call, data)[-1].done_reason == "length"
        body = json.loads(server.calls[-1].body)
        assert (body[key] if key in body and key != "options" else body["options"]["num_predict"]) == 6 - sent


@pytest.mark.parametrize("call", [chat(options={"num_predict": 3}), openai(max_tokens=3)])
def test_a_cut_after_the_last_allowed_token_completes_the_answer(call: HttpCall) -> None:
    server = ModelServer(tokens=20)
    frames = server.frames(call)
    answer = start_answer(call)
    data = answer.feed(b"".join(frames[:3]))
    ending = answer.handle_cut("connection lost")
    assert ending is not None
    assert ending.error is None
    assert chunks(call, data + ending.data)[-1].done_reason == "length"
    assert answer.finished


def test_a_node_is_asked_once_how_its_model_continues() -> None:
    strategies: ContinuationStrategies = {}
    for round_ in (1, 2):
        call, server = chat(), ModelServer()
        answer = start_answer(call, strategies)
        answer.feed(server.frames(call)[0])
        assert answer.handle_cut() is None
        question = answer.render_call("n", OLLAMA)
        assert (question is not None) == (round_ == 1)
        if question is not None:
            answer.apply_rendered_prompt("n", *server.render(question))
            assert json.loads(question.body)["options"]["num_predict"] == 1
        step = answer.next_call("n", OLLAMA)
        assert isinstance(step, HttpCall)
        assert json.loads(step.body)["messages"][-1]["role"] == "assistant"
    assert strategies == {("n", "m"): ContinuationStrategy.ASSISTANT_LAST}


def test_a_template_that_closes_turns_renders_one_prompt_for_each_answer() -> None:
    strategies: ContinuationStrategies = {}
    server = ModelServer(continues=False)
    for call in (chat(), openai()):
        answer = start_answer(call, strategies)
        data = drive(answer, call, server, [len(b"".join(server.frames(call)[:2])) for _ in range(3)])
        assert text(call, data) == text(call, server.stream(call))
        assert answer.render_call("n", OLLAMA) is None
        assert [sent.path for sent in server.calls].count("/api/generate") >= 1
    assert strategies == {("n", "m"): ContinuationStrategy.RAW}


def test_a_server_that_renders_no_prompt_continues_the_assistants_message_unless_known_otherwise() -> None:
    call, old = chat(), ModelServer(renders=False)
    answer = start_answer(call)
    answer.feed(old.frames(call)[0])
    step = continue_on_node(answer, old)
    assert isinstance(step, HttpCall)
    assert json.loads(step.body)["messages"][-1]["role"] == "assistant"

    known = start_answer(call, {("n", "m"): ContinuationStrategy.RAW})
    known.feed(old.frames(call)[0])
    assert known.handle_cut() is None
    question = known.render_call("n", OLLAMA)
    assert question is not None
    known.apply_rendered_prompt("n", *old.render(question))
    assert known.next_call("n", OLLAMA) is None  # this node cannot say how; the next one may
    known.apply_rendered_prompt("n", *ModelServer(continues=False).render(question))
    assert isinstance(known.next_call("n", OLLAMA), HttpCall)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"_debug_info":7}', b'{"_debug_info":{"rendered_template":"x"}}'])
def test_a_rendering_without_the_prompt_leaves_the_strategy_open(body: bytes) -> None:
    strategies: ContinuationStrategies = {}
    answer = start_answer(chat(), strategies)
    answer.feed(ModelServer().frames(chat())[0])
    assert answer.handle_cut() is None
    answer.apply_rendered_prompt("n", 200, body)
    answer.apply_rendered_prompt(
        "n", 500, ModelServer(continues=False).render(answer.render_call("n", OLLAMA) or chat())[1]
    )
    assert strategies == {}
    assert isinstance(answer.next_call("n", OLLAMA), HttpCall)


def test_a_marked_request_asks_other_kinds_of_server_to_continue_the_message() -> None:
    call, server = openai(), ModelServer()
    answer = start_answer(call, {("n", "m"): ContinuationStrategy.RAW})
    answer.feed(server.frames(call)[0])
    assert answer.handle_cut() is None
    assert answer.render_call("n", BackendKind.OPENAI) is None
    step = answer.next_call("n", BackendKind.OPENAI)
    assert isinstance(step, HttpCall)
    body = json.loads(step.body)
    assert step.path == call.path
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert body["messages"][-1] == {"role": "assistant", "content": answer.text}


def test_an_answer_that_the_client_began_is_one_message_with_it() -> None:
    begun = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "It is"}]
    for form in (chat, openai):
        call, server = form(messages=begun), ModelServer()
        uncut = server.stream(call)
        answer = start_answer(call)
        data = drive(answer, call, server, [len(b"".join(server.frames(call)[:2]))])
        assert text(call, data) == text(call, uncut)
        assert len(json.loads(server.calls[-1].body)["messages"]) == 2


@pytest.mark.parametrize("continues", [True, False], ids=["continues", "closes"])
@pytest.mark.parametrize("form", ["chat", "generate", "openai"])
def test_an_answer_is_continued_with_its_thinking(form: str, continues: bool) -> None:
    call, server = FORMS[form](), ModelServer(thinking=True, continues=continues)
    frames = server.frames(call)
    thoughts = len(server.script(call).thinking)
    answer = start_answer(call)
    data = drive(answer, call, server, [len(b"".join(frames[: thoughts + 3]))])
    assert text(call, data) == text(call, b"".join(frames))
    assert "".join(chunk.thinking for chunk in chunks(call, data)) == "".join(server.script(call).thinking)
    if continues:
        last_message = json.loads(server.calls[-1].body)["messages"][-1]
        assert last_message["thinking" if form != "openai" else "reasoning_content"] == "".join(
            server.script(call).thinking
        )


@pytest.mark.parametrize("call", [chat(), openai()])
def test_open_thinking_is_not_continued(call: HttpCall) -> None:
    server = ModelServer(thinking=True)
    answer = start_answer(call)
    answer.feed(b"".join(server.frames(call)[:2]))
    ending = answer.handle_cut("connection lost")
    assert ending is not None
    assert "still thinking" in (ending.error or "")
    assert "connection lost" in (ending.error or "")
    assert not answer.continuable


@pytest.mark.parametrize(
    "call",
    [
        chat(tools=[{"type": "function"}]),
        chat(format="json"),
        chat(format={"type": "object"}),
        chat(logprobs=True),
        generate(suffix="}"),
        generate(context=[1, 2]),
        generate(template="{{ .Prompt }}"),
        raw(images=["aGk="]),
        openai(tools=[{"type": "function"}]),
        openai(functions=[{}]),
        openai(response_format={"type": "json_object"}),
        openai(response_format={"type": "json_schema"}),
        openai(logprobs=True),
        openai(n=2),
    ],
)
def test_an_answer_to_such_a_request_is_not_continued(call: HttpCall) -> None:
    answer = start_answer(call)
    frames = ModelServer().frames(openai() if call.path.startswith("/v1") else chat())
    assert answer.feed(frames[0]) == frames[0]
    assert not answer.continuable
    ending = answer.handle_cut()
    assert ending is not None
    assert "could not be continued" in (ending.error or "")
    assert ending.data == b""
    assert answer.finished


def test_a_tool_call_is_not_continued_even_if_no_tool_was_offered() -> None:
    answer = start_answer(chat())
    answer.feed(b'{"message":{"content":"","tool_calls":[{"function":{"name":"f"}}]},"done":false}\n')
    ending = answer.handle_cut()
    assert ending is not None
    assert "it calls tools" in (ending.error or "")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages"])
def test_other_streams_are_passed_on_and_end_with_their_own_error(path: str) -> None:
    answer = Continuation(path, b"{}", clock=Clock())
    frame = b'data: {"type":"content_block_delta","delta":{"text":"x"}}\n\n'
    assert answer.feed(frame + frame[:20]) == frame
    ending = answer.handle_cut()
    assert ending is not None
    assert f"an answer of {path} cannot be continued" in (ending.error or "")
    assert b'"message":"it broke"' in answer.error_frame("it broke")
    assert answer.error_frame("x").endswith(b"\n\n")


def test_an_answer_is_continued_three_times_at_most() -> None:
    call, server = chat(), ModelServer(tokens=20)
    answer = start_answer(call)
    step: HttpCall | Ending = call
    for _ in range(MAX_CUTS):
        assert isinstance(step, HttpCall)
        answer.feed(server.frames(step)[0])
        step = continue_on_node(answer, server)
    assert isinstance(step, HttpCall)
    answer.feed(server.frames(step)[0])
    assert not answer.continuable
    ending = answer.handle_cut("connection lost")
    assert ending is not None
    assert f"more than {MAX_CUTS} times" in (ending.error or "")


def test_the_client_may_forbid_continuing() -> None:
    answer = start_answer(chat(), resume=False)
    answer.feed(ModelServer().frames(chat())[0])
    assert not answer.continuable
    ending = answer.handle_cut()
    assert ending is not None
    assert "the client asked for no continuation" in (ending.error or "")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (chat(messages=[{"role": "user", "content": "What is it?", "images": ["aGk="]}]), "images"),
        (generate(images=["aGk="]), "images"),
        (chat(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]), "client began"),
        (
            openai(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]),
            "told as text",
        ),
        (openai(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]), "client began"),
    ],
)
def test_what_a_template_that_closes_turns_cannot_continue(call: HttpCall, reason: str) -> None:
    server, strategies = ModelServer(continues=False), dict[tuple[str, str], ContinuationStrategy]()
    answer = start_answer(call, strategies)
    answer.feed(ModelServer().frames(openai() if call.path.startswith("/v1") else chat())[0])
    step = continue_on_node(answer, server)
    assert isinstance(step, Ending)
    assert reason in (step.error or "")
    assert strategies == {("n", "m"): ContinuationStrategy.RAW}


def test_images_are_continued_where_the_template_continues() -> None:
    call = chat(messages=[{"role": "user", "content": "What is it?", "images": ["aGk="]}])
    strategies: ContinuationStrategies = {}
    answer = start_answer(call, strategies)
    answer.feed(ModelServer().frames(chat())[0])
    assert answer.handle_cut() is None
    question = answer.render_call("n", OLLAMA)
    assert question is not None
    assert b"aGk=" not in question.body  # it is about the template alone
    answer.apply_rendered_prompt("n", *ModelServer().render(question))
    step = answer.next_call("n", OLLAMA)
    assert isinstance(step, HttpCall)
    assert json.loads(step.body)["messages"][0]["images"] == ["aGk="]


def test_a_turn_that_the_client_began_is_not_continued_by_other_kinds() -> None:
    begun = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "It is"}]
    for flag, continued in ((None, False), (True, True)):
        answer = start_answer(openai(messages=begun, continue_final_message=flag))
        answer.feed(ModelServer().frames(openai())[0])
        assert answer.handle_cut() is None
        step = answer.next_call("n", BackendKind.OPENAI)
        assert isinstance(step, HttpCall) is continued
