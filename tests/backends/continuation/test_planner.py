"""How another node goes on: by which strategy, with which budget, and which answers are not continued."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

from gpumesh.backends import safe_json
from gpumesh.backends.base import HttpCall
from gpumesh.backends.continuation.chat_streams import OpenAIChatFormat
from gpumesh.backends.continuation.continuation import MAX_CUTS, Continuation
from gpumesh.backends.continuation.ending import Ending
from gpumesh.backends.continuation.planner import ContinuationStrategies
from gpumesh.backends.continuation.prefill import ContinuationStrategy
from gpumesh.backends.continuation.stream_format import SENTINEL
from gpumesh.topology import BackendKind
from tests.backends.continuation.driving import (
    OLLAMA,
    Clock,
    ask_all,
    check_whole,
    chunks,
    continue_on_node,
    drive,
    start_answer,
    text,
)
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


def test_a_prompt_is_rendered_once_for_each_answer_and_continued_as_text() -> None:
    strategies: ContinuationStrategies = {}
    for continues, known in ((True, {}), (False, {("n", "m"): ContinuationStrategy.RAW})):
        server = ModelServer(continues=continues)
        for call in (chat(), generate(), openai()):
            answer = start_answer(call, strategies)
            data = drive(answer, call, server, [len(b"".join(server.frames(call)[:2])) for _ in range(3)])
            assert text(call, data) == text(call, server.stream(call))
            assert answer.next_question("n", OLLAMA) is None
            assert [sent.path for sent in server.calls].count("/api/generate") >= 1
            messages = [
                json.loads(sent.body).get("messages", [{}]) for sent in server.calls if b"_debug" not in sent.body
            ]
            assert not any(message[-1].get("role") == "assistant" for message in messages)
        assert strategies == known


def test_a_rendering_costs_one_token_at_most() -> None:
    answer = start_answer(chat())
    answer.feed(ModelServer().frames(chat())[0])
    assert answer.handle_cut() is None
    question = answer.next_question("n", OLLAMA)
    assert question is not None
    assert json.loads(question.body)["options"]["num_predict"] == 1


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"_debug_info":7}', b'{"_debug_info":{"rendered_template":"x"}}'])
@pytest.mark.parametrize("status", [200, 500, 0])
def test_without_a_prompt_and_without_a_sign_that_it_continues_a_node_is_passed_over(status: int, body: bytes) -> None:
    strategies: ContinuationStrategies = {}
    server = ModelServer(continues=False)
    answer = start_answer(chat(), strategies)
    answer.feed(server.frames(chat())[0])
    assert answer.handle_cut() is None
    rendering = answer.next_question("n", OLLAMA)
    assert rendering is not None
    answer.apply_reply(status, body)
    assert len(ask_all(answer, server)) == 1
    assert strategies == {}
    assert answer.next_call("n", OLLAMA) is None  # the next node may show it
    assert answer.next_question("other", OLLAMA) is not None
    answer.apply_reply(*server.reply(rendering))
    assert isinstance(answer.next_call("other", OLLAMA), HttpCall)


@pytest.mark.parametrize("form", ["chat", "generate", "openai"])
def test_a_server_that_repeats_the_message_is_recognised_and_its_repetition_is_removed(form: str) -> None:
    strategies: ContinuationStrategies = {}
    call, server = FORMS[form](), ModelServer(repeats=True, renders=False)
    for _ in range(2):
        data = drive(start_answer(call, strategies), call, server, [len(b"".join(server.frames(call)[:3]))] * 2)
        check_whole(call, data, server.stream(call))
    assert strategies == {("n", "m"): ContinuationStrategy.ASSISTANT_REPEATED}
    probes = [sent for sent in server.calls if SENTINEL.encode() in sent.body and b"_debug" not in sent.body]
    assert len(probes) == 1, "a node is asked once for each model"


def test_a_repetition_may_come_in_pieces_and_anything_else_is_a_failure() -> None:
    server = ModelServer(repeats=True, renders=False)
    for frames, cut in ((["It", " is", " so"], False), (["It is so"], False), (["It", " was"], True), (["It"], True)):
        answer = start_answer(chat(), {("n", "m"): ContinuationStrategy.ASSISTANT_REPEATED})
        answer.feed(b'{"message":{"content":"It is"},"done":false}\n')
        assert isinstance(continue_on_node(answer, server), HttpCall)
        lines = ['{"message":{"content":"","thinking":"hm"},"done":false}']
        lines += [json.dumps({"message": {"content": piece}, "done": False}) for piece in frames]
        lines.append('{"message":{"content":""},"done":true,"done_reason":"stop"}')
        data = b"".join([answer.feed(line.encode() + b"\n") for line in lines])
        assert (answer.cut_reason is not None) == cut
        assert answer.finished != cut
        assert b"hm" not in data
        assert data.count(b"\n") == (0 if cut else 2)  # of the repeated frames, nothing is left
        assert answer.text == ("It is" if cut else "It is so")


def test_a_marked_request_asks_other_kinds_of_server_to_continue_the_message() -> None:
    call, server = openai(), ModelServer()
    answer = start_answer(call, {("n", "m"): ContinuationStrategy.ASSISTANT_LAST})
    answer.feed(server.frames(call)[0])
    assert answer.handle_cut() is None
    assert answer.next_question("n", BackendKind.OPENAI) is None
    step = answer.next_call("n", BackendKind.OPENAI)
    assert isinstance(step, HttpCall)
    body = json.loads(step.body)
    assert step.path == call.path
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert body["messages"][-1] == {"role": "assistant", "content": answer.text}


def probe_reply(said: str, prompt_tokens: int | None) -> tuple[int, bytes]:
    """The stream of an OpenAI server that answers a probe."""
    frames = [{"choices": [{"index": 0, "delta": {"content": said}, "finish_reason": None}]}]
    frames.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
    if prompt_tokens is not None:
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 1, "total_tokens": prompt_tokens + 1}
        frames.append({"choices": [], "usage": usage})  # type: ignore[dict-item]
    return 200, b"".join([b"data: " + json.dumps(frame).encode() + b"\n\n" for frame in frames]) + b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("marked", "unmarked", "strategy"),
    [
        (probe_reply("x", 9), probe_reply("y", 12), ContinuationStrategy.ASSISTANT_LAST),
        (probe_reply("x", 9), probe_reply(SENTINEL + "x", 9), ContinuationStrategy.ASSISTANT_LAST),
        (probe_reply(SENTINEL + "x", 9), probe_reply(SENTINEL + "x", 9), ContinuationStrategy.ASSISTANT_REPEATED),
        (probe_reply(SENTINEL, None), (400, b"{}"), ContinuationStrategy.ASSISTANT_REPEATED),
        (probe_reply("x", 12), probe_reply("y", 12), None),
        (probe_reply("x", 9), probe_reply(SENTINEL + "x", 12), ContinuationStrategy.ASSISTANT_LAST),
        (probe_reply("x", 14), probe_reply("y", 12), None),
        (probe_reply("x", None), probe_reply("y", None), None),
        (probe_reply(f" {SENTINEL} x", 9), probe_reply("y", 12), None),
        ((400, b'{"error":"no"}'), probe_reply("y", 12), None),
        (probe_reply("x", 9), (0, b""), None),
        ((200, b'data: {"error":{"message":"no"}}\n\n'), probe_reply("y", 12), None),
        ((200, probe_reply("x", 9)[1][:80]), probe_reply("y", 12), None),
    ],
    ids=[
        "vLLM: the mark leaves the turn open",
        "llama-server: the same prompt, and without the mark it repeats",
        "repeats",
        "repeats, and counts nothing",
        "does not know the mark",
        "both",
        "more tokens with the mark",
        "counts nothing",
        "not exactly the message",
        "refuses the mark",
        "no second answer",
        "an error",
        "a cut answer",
    ],
)
def test_whether_a_marked_message_is_continued_is_seen_by_its_answer(
    marked: tuple[int, bytes], unmarked: tuple[int, bytes], strategy: ContinuationStrategy | None
) -> None:
    strategies: ContinuationStrategies = {}
    answer = start_answer(openai(), strategies)
    answer.feed(ModelServer().frames(openai())[0])
    assert answer.handle_cut() is None
    replies, bodies = [marked, unmarked], []
    while (question := answer.next_question("n", BackendKind.VLLM)) is not None:
        bodies.append(json.loads(question.body))
        answer.apply_reply(*replies.pop(0))
    assert bodies[0]["continue_final_message"] is True
    assert all(body["max_tokens"] == 1 and body["stream"] is True for body in bodies)
    assert all(body["messages"][-1] == {"role": "assistant", "content": SENTINEL} for body in bodies)
    assert "continue_final_message" not in bodies[-1] or len(bodies) == 1
    assert strategies == ({} if strategy is None else {("n", "m"): strategy})
    assert (answer.next_call("n", BackendKind.VLLM) is None) == (strategy is None)


def test_an_answer_that_the_client_began_is_one_message_with_it() -> None:
    begun = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "It is"}]
    for form in (chat, openai):
        call, server = form(messages=begun), ModelServer()
        uncut = server.stream(call)
        answer = start_answer(call)
        data = drive(answer, call, server, [len(b"".join(server.frames(call)[:2]))])
        assert text(call, data) == text(call, uncut)
        prompt = json.loads(server.calls[-1].body)["prompt"]
        assert prompt.endswith("It is" + "".join(server.script(call).tokens[:2]))


@pytest.mark.parametrize("said", ["It is", "It is late", "It"])
def test_an_answer_that_may_repeat_what_the_client_began_is_not_continued(said: str) -> None:
    begun = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "It is"}]
    answer = start_answer(chat(messages=begun))
    answer.feed(b'{"message":{"content":"' + said.encode() + b'"},"done":false}\n')
    assert not answer.continuable
    ending = answer.handle_cut()
    assert ending is not None
    assert "may have repeated" in (ending.error or "")


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
    questions = [json.loads(sent.body) for sent in server.calls if b"_debug" in sent.body]
    assert [body["messages"][-1]["thinking"] for body in questions] == ["".join(server.script(call).thinking)]


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
    frame = b'data: {"type":"content_block_delta","delta":{"text":"x"},"choices":[{"text":"x"}]}\n\n'
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
    questions = ask_all(answer, ModelServer())
    assert [b"aGk=" in question.body for question in questions] == [False, False]  # they are about the template alone
    assert strategies == {("n", "m"): ContinuationStrategy.ASSISTANT_LAST}
    assert answer.next_question("n", OLLAMA) is None
    step = answer.next_call("n", OLLAMA)
    assert isinstance(step, HttpCall)
    assert json.loads(step.body)["messages"][0]["images"] == ["aGk="]


def test_a_turn_that_the_client_began_is_not_continued_by_other_kinds() -> None:
    begun = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "It is"}]
    for flag, continued in ((None, False), (True, True)):
        known = {("n", "m"): ContinuationStrategy.ASSISTANT_LAST}
        answer = start_answer(openai(messages=begun, continue_final_message=flag), known)
        answer.feed(ModelServer().frames(openai())[0])
        assert answer.handle_cut() is None
        step = answer.next_call("n", BackendKind.OPENAI)
        assert isinstance(step, HttpCall) is continued


def long_chat(count: int) -> HttpCall:
    """A chat of so many short messages."""
    call = openai()
    body = json.loads(call.body)
    message = {"role": "user", "content": "a"}
    return replace(call, body=json.dumps({**body, "messages": [message] * count}, separators=(",", ":")).encode())


def test_a_long_request_is_taken_apart_before_the_cut_is_handled_in_two_steps() -> None:
    call = long_chat(10_000)
    answer = start_answer(call)
    answer.feed(b"".join(ModelServer(tokens=20).frames(openai())[:3]))
    assert len(list(answer.prepare_cut())) == 2, "the estimate of its cost, then the parsing"
    assert answer.handle_cut("connection lost") is None, "another node can continue"


def test_a_request_that_costs_too_much_is_not_taken_apart() -> None:
    call = long_chat(safe_json.ANSWER_VALUES // 3 + 1)
    answer = start_answer(call)
    answer.feed(b"".join(ModelServer(tokens=20).frames(openai())[:3]))
    assert list(answer.prepare_cut()) == []
    ending = answer.handle_cut("connection lost")
    assert ending is not None
    assert "its request is too large to be taken apart" in str(ending.error)


@pytest.mark.parametrize(
    ("content", "is_text"),
    [
        ("a", True),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], True),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}], False),
        ([{"type": "text", "text": 1}], False),
    ],
)
def test_only_a_chat_of_texts_is_continued_from_its_rendered_prompt(content: object, is_text: bool) -> None:
    messages = [{"role": "user", "content": content}, {"role": "user", "content": "b"}]
    refusal = OpenAIChatFormat("/v1/chat/completions").raw_prompt_refusal({"messages": messages})
    assert (refusal is None) is is_text
