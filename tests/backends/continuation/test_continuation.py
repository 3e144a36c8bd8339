"""A cut answer, whole again: with cuts at every byte, and with what must not be continued."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumesh.backends.base import Chunk, HttpCall
from gpumesh.backends.continuation.continuation import MAX_CUTS, Continuation, Ending
from gpumesh.backends.continuation.planner import ContinuationStrategies, ContinuationStrategy
from gpumesh.backends.continuation.received_text import MAX_REPEATED_TOKENS, UNREAD_BYTES
from gpumesh.backends.dialects import DIALECTS, find_counters
from gpumesh.backends.frames import EVENT_LINES, LINE_LIMIT
from gpumesh.topology import BackendKind
from tests.backends.models import EVAL_NS, FORMS, ModelServer, chat, generate, openai, raw

OLLAMA = BackendKind.OLLAMA
Cuts = Sequence[int]


class Clock:
    now = 50.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def begin(call: HttpCall, ways: ContinuationStrategies | None = None, **more: Any) -> Continuation:
    return Continuation(call.path, call.body, clock=Clock(), strategies=ways, **more)


def go_on(answer: Continuation, server: ModelServer, reason: str | None = None) -> HttpCall | Ending:
    """From the cut to the next call, as a proxy does it."""
    ending = answer.handle_cut(reason)
    if ending is not None:
        return ending
    question = answer.render_call("n", OLLAMA)
    if question is not None:
        answer.apply_rendered_prompt("n", *server.render(question))
    step = answer.next_call("n", OLLAMA)
    assert step is not None
    return step


def drive(
    answer: Continuation, call: HttpCall, server: ModelServer, cuts: Cuts, *, piece: int = 1 << 20, first: bytes = b""
) -> bytes:
    """The client's bytes when the n-th upstream is cut after ``cuts[n]`` bytes; each comes in pieces of ``piece``.

    ``first``: what the first one sends, if that was made before.
    """
    out = b""
    left = list(cuts)
    while True:
        stream, first = first or server.stream(call), b""
        if left:
            stream = stream[: left.pop(0)]
        for start in range(0, len(stream), piece):
            out += answer.feed(stream[start : start + piece])
        if answer.finished:
            return out
        step = go_on(answer, server)
        if isinstance(step, Ending):
            assert step.error is None, step.error
            return out + step.data
        call = step


def chunks(call: HttpCall, data: bytes) -> list[Chunk]:
    """As a client reads them. Raises for an answer that is not whole."""
    reader = DIALECTS[BackendKind.OPENAI if call.path.startswith("/v1") else OLLAMA].create_reader(stream=True)
    return [*reader.feed(data), *reader.close()]


def text(call: HttpCall, data: bytes) -> str:
    return "".join(chunk.text for chunk in chunks(call, data))


def final(call: HttpCall, data: bytes) -> dict[str, Any]:
    """The last frame that is JSON."""
    lines = [line.removeprefix(b"data: ") for line in data.splitlines() if line.strip()]
    documents: list[dict[str, Any]] = [json.loads(line) for line in lines if line != b"[DONE]"]
    return documents[-1]


def check_whole(call: HttpCall, data: bytes, want: bytes) -> bool:
    """Text and figures are those of the answer that was never cut; there is one final frame, and it is the last.

    Returns whether there are figures: cut right before it, OpenAI's frame of usage is known to nobody.
    """
    said = chunks(call, data)
    assert "".join(chunk.text for chunk in said) == text(call, want)
    assert [chunk.done for chunk in said].count(True) == 1
    assert said[-1].done
    assert data.count(b"data: [DONE]") == call.path.startswith("/v1")
    expected, counted = chunks(call, want)[-1], said[-1]
    assert counted.done_reason == expected.done_reason
    assert expected.counters is not None
    if counted.counters is None:
        assert b'"usage"' not in data
        return False
    assert counted.counters.tokens == expected.counters.tokens
    assert counted.counters.prompt_tokens == expected.counters.prompt_tokens
    return True


@pytest.mark.parametrize("continues", [True, False], ids=["continues", "closes"])
@pytest.mark.parametrize("form", FORMS)
def test_cut_at_every_byte(form: str, continues: bool) -> None:
    call, server, ways = (
        FORMS[form](),
        ModelServer(continues=continues, tokens=5),
        dict[tuple[str, str], ContinuationStrategy](),
    )
    frames = server.frames(call)
    want = b"".join(frames)
    without_figures = []
    for cut in range(len(want)):
        data = drive(begin(call, ways), call, server, [cut], first=want)
        if not check_whole(call, data, want):
            without_figures.append(cut)
    if form == "openai":
        usage = want.rindex(b"data: {")
        assert without_figures == list(range(usage, want.index(b"data: [DONE]")))
    else:
        assert not without_figures


@pytest.mark.parametrize("form", FORMS)
@given(st.data())
@settings(deadline=None, max_examples=60)
def test_several_cuts_anywhere_whatever_the_network_makes_of_the_bytes(form: str, data: st.DataObject) -> None:
    call = FORMS[form](options={"seed": data.draw(st.integers(0, 1000))}, seed=data.draw(st.integers(0, 1000)))
    server = ModelServer(continues=data.draw(st.booleans()), tokens=data.draw(st.integers(1, 30)))
    want = server.stream(call)
    cuts = data.draw(st.lists(st.integers(0, len(want) - 1), max_size=MAX_CUTS))
    answer = begin(call)
    out = drive(answer, call, server, cuts, piece=data.draw(st.integers(1, 700)))
    check_whole(call, out, want)
    assert answer.text == text(call, want)


@pytest.mark.parametrize("form", FORMS)
def test_a_long_answer_is_held_as_its_text_and_continued_from_there(form: str) -> None:
    call, server = FORMS[form](), ModelServer(tokens=1800)
    want = server.stream(call)
    assert len(want) > 2 * UNREAD_BYTES
    for cut in (UNREAD_BYTES + 100, len(want) - 900):
        check_whole(call, drive(begin(call), call, server, [cut], piece=4096), want)


@pytest.mark.parametrize("form", FORMS)
def test_uncut_every_byte_passes_as_it_came(form: str) -> None:
    call, server = FORMS[form](), ModelServer()
    stream = server.stream(call)
    answer = begin(call)
    assert b"".join(answer.feed(stream[at : at + 1]) for at in range(len(stream))) == stream
    assert answer.finished
    assert answer.counters is not None
    assert answer.counters.tokens == 8
    assert answer.answer_counters == answer.counters
    assert answer.feed(b"more") == b""


def test_half_a_frame_never_reaches_the_client() -> None:
    answer = begin(chat())
    line = '{"message":{"content":"größer 👩\u200d🚀"},"done":false}\n'.encode()
    for at in range(len(line) - 1):
        assert answer.feed(line[at : at + 1]) == b""
    assert answer.feed(line[-1:]) == line


# -- what the last frame says ----------------------------------------------------------------------------------------


def test_the_final_frame_says_what_happened_in_native_figures() -> None:
    call, server = chat(), ModelServer()
    frames = server.frames(call)
    data = drive(begin(call), call, server, [len(b"".join(frames[:3])) + 5])
    last = final(call, data)
    assert last["gpumesh"] == {"continued": 1, "tokens_before": 3}
    assert last["eval_count"] == 8
    assert last["total_duration"] >= last["eval_duration"] >= 5 * EVAL_NS
    assert last["model"] == "m"
    assert b"context" not in data


@pytest.mark.parametrize("continues", [True, False], ids=["continues", "closes"])
def test_the_final_frames_say_what_happened_in_openais_figures(continues: bool) -> None:
    call, server = openai(), ModelServer(continues=continues)
    frames = server.frames(call)
    data = drive(begin(call), call, server, [len(b"".join(frames[:3])) + 5])
    documents = [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: {")]
    assert documents[-1]["usage"]["completion_tokens"] == 8
    assert documents[-1]["usage"]["total_tokens"] == 8 + documents[-1]["usage"]["prompt_tokens"]
    assert documents[-1]["gpumesh"] == documents[-2]["gpumesh"] == {"continued": 1, "tokens_before": 3}
    assert documents[-2]["choices"][0]["finish_reason"] == "stop"
    names = {(document["id"], document["created"], document["model"], document["object"]) for document in documents}
    assert len(names) == 1


def test_a_comment_before_the_first_chunk_does_not_name_the_answer() -> None:
    call, server = openai(), ModelServer(continues=False)
    frames = server.frames(call)
    answer = begin(call)
    out = answer.feed(b": ping\n\n") + answer.feed(b"".join(frames[:3]))
    step = go_on(answer, server)
    assert isinstance(step, HttpCall)
    out += answer.feed(server.stream(step))
    assert (
        len({frame["id"] for line in out.splitlines() if line[:7] == b"data: {" for frame in [json.loads(line[6:])]})
        == 1
    )
    check_whole(call, out.removeprefix(b": ping\n\n"), b"".join(frames))


def test_without_include_usage_there_is_no_usage_after_a_continuation_either() -> None:
    for continues in (True, False):
        call, server = openai(stream_options=None), ModelServer(continues=continues)
        data = drive(begin(call), call, server, [len(b"".join(server.frames(call)[:3]))])
        assert b"usage" not in data
        assert text(call, data) == text(call, server.stream(call))


def test_a_generate_that_chat_continues_stays_a_generate() -> None:
    call, server = generate(), ModelServer()
    data = drive(begin(call), call, server, [300])
    assert server.calls[-1].path == "/api/chat"
    for line in data.splitlines():
        assert "response" in json.loads(line)
        assert "message" not in json.loads(line)


def test_counters_are_the_last_servers_own_and_told_are_the_whole_answers() -> None:
    call, server = chat(), ModelServer()
    answer = begin(call)
    drive(answer, call, server, [len(b"".join(server.frames(call)[:3]))])
    assert answer.counters is not None
    assert answer.answer_counters is not None
    assert (answer.counters.tokens, answer.answer_counters.tokens) == (5, 8)


# -- budgets ---------------------------------------------------------------------------------------------------------


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
        data = drive(begin(call), call, server, [len(b"".join(frames[:sent]))])
        assert text(call, data) == text(call, b"".join(frames))
        assert chunks(call, data)[-1].done_reason == "length"
        body = json.loads(server.calls[-1].body)
        assert (body[key] if key in body and key != "options" else body["options"]["num_predict"]) == 6 - sent


@pytest.mark.parametrize("call", [chat(options={"num_predict": 3}), openai(max_tokens=3)])
def test_cut_when_the_budget_is_spent_the_answer_is_complete(call: HttpCall) -> None:
    server = ModelServer(tokens=20)
    frames = server.frames(call)
    answer = begin(call)
    data = answer.feed(b"".join(frames[:3]))
    ending = answer.handle_cut("connection lost")
    assert ending is not None
    assert ending.error is None
    assert chunks(call, data + ending.data)[-1].done_reason == "length"
    assert answer.finished


# -- endings ---------------------------------------------------------------------------------------------------------


def test_a_last_frame_without_its_end_mark_counts_when_the_body_ended_rightly() -> None:
    for call in (chat(), openai()):
        stream = ModelServer().stream(call)
        answer = begin(call)
        out = answer.feed(stream.rstrip(b"\n"))
        assert not answer.finished
        out += answer.finish_body()
        assert answer.finished
        assert text(call, out) == text(call, stream)


@pytest.mark.parametrize("call", [chat(), openai()])
def test_half_a_frame_at_a_right_end_of_the_body_is_a_cut(call: HttpCall) -> None:
    stream = ModelServer().stream(call)
    for end in range(len(stream) - 1):
        answer = begin(call)
        out = answer.feed(stream[:end])
        out += answer.finish_body()
        assert answer.finish_body() == b""
        assert stream.startswith(out.rstrip(b"\n"))
        for frame in out.split(answer.frame_separator):
            assert not frame.strip() or frame.endswith((b"}", b"[DONE]"))
        assert answer.finished == (out.rstrip() == stream.rstrip())


def test_openais_done_without_a_reason_to_finish_is_a_failure_in_disguise() -> None:
    call, server = openai(), ModelServer()
    frames = server.frames(call)
    answer = begin(call)
    out = answer.feed(b"".join(frames[:2]))
    assert answer.feed(b"data: [DONE]\n\n") == b""
    assert answer.cut_reason is not None
    step = go_on(answer, server)
    assert isinstance(step, HttpCall)
    out += answer.feed(server.stream(step))
    check_whole(call, out, b"".join(frames))


def test_what_is_missing_after_the_text_is_added_without_asking_anybody() -> None:
    call = openai(stream_options=None)
    stream = ModelServer().stream(call).removesuffix(b"data: [DONE]\n\n")
    answer = begin(call)
    out = answer.feed(stream)
    ending = answer.handle_cut("connection lost")
    assert ending == Ending(b"data: [DONE]\n\n")
    assert chunks(call, out + ending.data)[-1].done_reason == "stop"


@pytest.mark.parametrize(
    ("call", "frame"),
    [
        (chat(), b'{"error":"model runner has unexpectedly stopped"}\n'),
        (openai(), b'data: {"error":{"message":"model runner has unexpectedly stopped"}}\n\n'),
        (openai(), b'error: {"message":"model runner has unexpectedly stopped"}\n\n'),
    ],
    ids=["native", "openai", "old llama-server"],
)
def test_an_error_in_mid_stream_is_not_passed_on_but_made_good(call: HttpCall, frame: bytes) -> None:
    server = ModelServer()
    frames = server.frames(call)
    answer = begin(call)
    out = answer.feed(b"".join(frames[:4]) + frame + frames[4])
    assert answer.cut_reason is not None
    assert "unexpectedly stopped" in answer.cut_reason
    assert answer.feed(frames[5]) == b""
    step = go_on(answer, server)
    assert isinstance(step, HttpCall)
    check_whole(call, out + answer.feed(server.stream(step)), b"".join(frames))


def test_a_line_that_is_no_json_is_a_cut_once_it_is_looked_at() -> None:
    answer = begin(chat())
    assert answer.feed(b'<html>"error"</html>\n') == b""
    assert answer.cut_reason == "a line that is no JSON"


def test_a_frame_without_an_end_does_not_fill_memory() -> None:
    answer = begin(chat())
    piece = b"x" * (1 << 20)
    for _ in range(17):
        answer.feed(piece)
    assert answer.cut_reason is not None
    assert "MiB" in answer.cut_reason


@pytest.mark.parametrize("call", [chat(), openai()])
def test_a_frame_in_small_pieces_costs_no_more_than_its_length(call: HttpCall) -> None:
    answer, piece = begin(call), b"x" * 500
    began = time.thread_time()
    for _ in range((LINE_LIMIT - 1) // len(piece)):
        assert answer.feed(piece) == b""
    assert time.thread_time() - began < 2.0
    assert answer.cut_reason is None


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\n\r\n", b"\r\n\n"])
def test_an_event_ends_however_its_lines_end_and_wherever_it_is_cut(end: bytes) -> None:
    events = b"".join(b'data: {"choices":[{"delta":{"content":"%d"}}]}' % one + end for one in range(3))
    for size in range(1, len(events) + 1):
        answer = begin(openai())
        got = [answer.feed(events[start : start + size]) for start in range(0, len(events), size)]
        assert b"".join(got) == events
        assert all(one.endswith(b"\n") for one in got if one)
        assert answer.text == "012"


def test_an_event_of_thousands_of_lines_is_a_cut() -> None:
    answer = begin(openai())
    answer.feed(b'data: {"tool_calls":[]}\n' + b"data:\n" * 2 * EVENT_LINES + b"\n")
    assert answer.cut_reason == f"an event of more than {EVENT_LINES} lines"


def test_a_node_that_fails_before_its_first_frame_leaves_no_trace() -> None:
    call, server = chat(), ModelServer()
    frames = server.frames(call)
    answer = begin(call)
    out = answer.feed(b"".join(frames[:3]))
    assert isinstance(go_on(answer, server), HttpCall)
    assert answer.feed(b'{"error":"cannot load"}\n') == b""
    assert answer.cut_reason == "cannot load"
    answer.abandon_upstream()
    assert answer.feed(b'{"mess') == b""
    answer.abandon_upstream()
    step = answer.next_call("n", OLLAMA)
    assert isinstance(step, HttpCall)
    check_whole(call, out + answer.feed(server.stream(step)), b"".join(frames))
    assert answer.cuts == 1


def test_cut_before_any_text_the_same_is_asked_again() -> None:
    for call in (chat(), generate(), openai()):
        answer = begin(call)
        opening = b'data: {"id":"1","choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
        answer.feed(opening if call.path.startswith("/v1") else b'{"message":{"content":""},"done":false}\n')
        step = go_on(answer, ModelServer())
        assert isinstance(step, HttpCall)
        assert (step.path, step.body) == (call.path, call.body)


# -- ways ------------------------------------------------------------------------------------------------------------


def test_how_a_model_continues_is_asked_once() -> None:
    ways: ContinuationStrategies = {}
    for round_ in (1, 2):
        call, server = chat(), ModelServer()
        answer = begin(call, ways)
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
    assert ways == {("n", "m"): ContinuationStrategy.ASSISTANT_LAST}


def test_a_template_that_closes_turns_is_asked_for_each_prompt_and_once_for_each_answer() -> None:
    ways: ContinuationStrategies = {}
    server = ModelServer(continues=False)
    for call in (chat(), openai()):
        answer = begin(call, ways)
        data = drive(answer, call, server, [len(b"".join(server.frames(call)[:2])) for _ in range(3)])
        assert text(call, data) == text(call, server.stream(call))
        assert answer.render_call("n", OLLAMA) is None
        assert [sent.path for sent in server.calls].count("/api/generate") >= 1
    assert ways == {("n", "m"): ContinuationStrategy.RAW}


def test_a_server_too_old_to_show_its_prompt_is_trusted_unless_it_is_known_better() -> None:
    call, old = chat(), ModelServer(renders=False)
    answer = begin(call)
    answer.feed(old.frames(call)[0])
    step = go_on(answer, old)
    assert isinstance(step, HttpCall)
    assert json.loads(step.body)["messages"][-1]["role"] == "assistant"

    known = begin(call, {("n", "m"): ContinuationStrategy.RAW})
    known.feed(old.frames(call)[0])
    assert known.handle_cut() is None
    question = known.render_call("n", OLLAMA)
    assert question is not None
    known.apply_rendered_prompt("n", *old.render(question))
    assert known.next_call("n", OLLAMA) is None  # this node cannot say how; the next one may
    known.apply_rendered_prompt("n", *ModelServer(continues=False).render(question))
    assert isinstance(known.next_call("n", OLLAMA), HttpCall)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"_debug_info":7}', b'{"_debug_info":{"rendered_template":"x"}}'])
def test_an_answer_that_tells_nothing_leaves_the_way_open(body: bytes) -> None:
    ways: ContinuationStrategies = {}
    answer = begin(chat(), ways)
    answer.feed(ModelServer().frames(chat())[0])
    assert answer.handle_cut() is None
    answer.apply_rendered_prompt("n", 200, body)
    answer.apply_rendered_prompt(
        "n", 500, ModelServer(continues=False).render(answer.render_call("n", OLLAMA) or chat())[1]
    )
    assert ways == {}
    assert isinstance(answer.next_call("n", OLLAMA), HttpCall)


def test_other_kinds_of_server_are_not_asked_and_are_told_that_the_message_goes_on() -> None:
    call, server = openai(), ModelServer()
    answer = begin(call, {("n", "m"): ContinuationStrategy.RAW})
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
        want = server.stream(call)
        answer = begin(call)
        data = drive(answer, call, server, [len(b"".join(server.frames(call)[:2]))])
        assert text(call, data) == text(call, want)
        assert len(json.loads(server.calls[-1].body)["messages"]) == 2


# -- thinking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("continues", [True, False], ids=["continues", "closes"])
@pytest.mark.parametrize("form", ["chat", "generate", "openai"])
def test_after_its_thoughts_an_answer_is_continued_with_them(form: str, continues: bool) -> None:
    call, server = FORMS[form](), ModelServer(thinking=True, continues=continues)
    frames = server.frames(call)
    thoughts = len(server.script(call).thinking)
    answer = begin(call)
    data = drive(answer, call, server, [len(b"".join(frames[: thoughts + 3]))])
    assert text(call, data) == text(call, b"".join(frames))
    assert "".join(chunk.thinking for chunk in chunks(call, data)) == "".join(server.script(call).thinking)
    if continues:
        said = json.loads(server.calls[-1].body)["messages"][-1]
        assert said["thinking" if form != "openai" else "reasoning_content"] == "".join(server.script(call).thinking)


@pytest.mark.parametrize("call", [chat(), openai()])
def test_open_thinking_is_not_continued(call: HttpCall) -> None:
    server = ModelServer(thinking=True)
    answer = begin(call)
    answer.feed(b"".join(server.frames(call)[:2]))
    ending = answer.handle_cut("connection lost")
    assert ending is not None
    assert "still thinking" in (ending.error or "")
    assert "connection lost" in (ending.error or "")
    assert not answer.continuable


# -- what is not continued -------------------------------------------------------------------------------------------


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
def test_refused(call: HttpCall) -> None:
    answer = begin(call)
    frames = ModelServer().frames(openai() if call.path.startswith("/v1") else chat())
    assert answer.feed(frames[0]) == frames[0]
    assert not answer.continuable
    ending = answer.handle_cut()
    assert ending is not None
    assert "could not be continued" in (ending.error or "")
    assert ending.data == b""
    assert answer.finished


def test_a_call_of_a_tool_is_not_continued_though_none_was_offered() -> None:
    answer = begin(chat())
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


def test_what_repeats_itself_is_given_up() -> None:
    answer = begin(chat())
    line = b'{"message":{"content":" ha"},"done":false}\n'
    for _ in range(MAX_REPEATED_TOKENS - 1):
        answer.feed(line)
    assert answer.continuable
    answer.feed(line)
    ending = answer.handle_cut()
    assert ending is not None
    assert "it repeats itself" in (ending.error or "")


def test_three_times_and_not_once_more() -> None:
    call, server = chat(), ModelServer(tokens=20)
    answer = begin(call)
    step: HttpCall | Ending = call
    for _ in range(MAX_CUTS):
        assert isinstance(step, HttpCall)
        answer.feed(server.frames(step)[0])
        step = go_on(answer, server)
    assert isinstance(step, HttpCall)
    answer.feed(server.frames(step)[0])
    assert not answer.continuable
    ending = answer.handle_cut("connection lost")
    assert ending is not None
    assert f"more than {MAX_CUTS} times" in (ending.error or "")


def test_the_client_may_forbid_it() -> None:
    answer = begin(chat(), resume=False)
    answer.feed(ModelServer().frames(chat())[0])
    assert not answer.continuable
    ending = answer.handle_cut()
    assert ending is not None
    assert "the client asked for no continuation" in (ending.error or "")


@pytest.mark.parametrize(
    ("call", "words"),
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
def test_what_a_closing_template_makes_impossible(call: HttpCall, words: str) -> None:
    server, ways = ModelServer(continues=False), dict[tuple[str, str], ContinuationStrategy]()
    answer = begin(call, ways)
    answer.feed(ModelServer().frames(openai() if call.path.startswith("/v1") else chat())[0])
    step = go_on(answer, server)
    assert isinstance(step, Ending)
    assert words in (step.error or "")
    assert ways == {("n", "m"): ContinuationStrategy.RAW}


def test_images_are_no_hindrance_where_the_template_continues() -> None:
    call = chat(messages=[{"role": "user", "content": "What is it?", "images": ["aGk="]}])
    ways: ContinuationStrategies = {}
    answer = begin(call, ways)
    answer.feed(ModelServer().frames(chat())[0])
    assert answer.handle_cut() is None
    question = answer.render_call("n", OLLAMA)
    assert question is not None
    assert b"aGk=" not in question.body  # it is about the template alone
    answer.apply_rendered_prompt("n", *ModelServer().render(question))
    step = answer.next_call("n", OLLAMA)
    assert isinstance(step, HttpCall)
    assert json.loads(step.body)["messages"][0]["images"] == ["aGk="]


def test_a_began_turn_means_different_things_to_different_servers() -> None:
    begun = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "It is"}]
    for flag, continued in ((None, False), (True, True)):
        answer = begin(openai(messages=begun, continue_final_message=flag))
        answer.feed(ModelServer().frames(openai())[0])
        assert answer.handle_cut() is None
        step = answer.next_call("n", BackendKind.OPENAI)
        assert isinstance(step, HttpCall) is continued


def test_an_answer_past_every_context_is_passed_on_but_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumesh.backends.continuation.received_text.TEXT_LIMIT", 2000)
    answer = begin(chat())
    line = json.dumps({"message": {"content": "x" * 100}, "done": False}).encode() + b"\n"
    for _ in range(3 * UNREAD_BYTES // len(line)):
        assert answer.feed(line) == line
    assert not answer.continuable
    assert answer.text == ""
    ending = answer.handle_cut()
    assert ending is not None
    assert "too long" in (ending.error or "")


def test_figures_are_looked_for_among_the_last_lines_only() -> None:
    figures = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":7}}\n\ndata: [DONE]\n\n'
    told = find_counters(b"data: {}\n\n" * 1000 + figures)
    assert told is not None
    assert told.tokens == 7
    began = time.thread_time()
    assert find_counters(b"\n" * LINE_LIMIT) is None
    assert time.thread_time() - began < 1.0


def test_a_query_in_the_path_changes_nothing() -> None:
    for form, bare in ((chat, "/api/chat"), (openai, "/v1/chat/completions")):
        call = form()
        server = ModelServer()
        answer = Continuation(f"{bare}?trace=1", call.body, clock=Clock())
        out = answer.feed(b"".join(server.frames(call)[:3]))
        step = go_on(answer, server)
        assert isinstance(step, HttpCall)
        stream = server.stream(HttpCall("POST", step.path.partition("?")[0], step.body))
        check_whole(call, out + answer.feed(stream), server.stream(call))


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_a_run_of_blank_lines_costs_as_little_as_one(path: str) -> None:
    """Before the frame that ends an answer, and in a stream whose frames are all read because it continues another."""
    end = b'{"message":{"content":""},"done":true}\n' if path == "/api/chat" else b'data: {"error":"no"}\n\n'
    for blank in (b"\n", b"\r\n"):
        answer = Continuation(path, b"{}", clock=Clock())
        began = time.process_time()
        answer.feed(blank * 70_000 + end)
        assert time.process_time() - began < 0.05
        assert answer.finished or answer.cut_reason == "no"
