"""A cut answer, whole again: with cuts at every byte, in every form of stream."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumesh.backends.base import HttpCall, ServerCounters
from gpumesh.backends.continuation.continuation import MAX_CUTS, Continuation
from gpumesh.backends.continuation.ending import Ending
from gpumesh.backends.continuation.prefill import ContinuationStrategy
from gpumesh.backends.dialects import find_counters
from gpumesh.backends.frames import LINE_LIMIT, MAX_EVENT_LINES
from tests.backends.continuation.driving import (
    OLLAMA,
    Clock,
    check_whole,
    chunks,
    continue_on_node,
    drive,
    final,
    start_answer,
    text,
)
from tests.backends.models import EVAL_NS, FORMS, ModelServer, chat, generate, openai


@pytest.mark.parametrize("continues", [True, False], ids=["continues", "closes"])
@pytest.mark.parametrize("form", FORMS)
def test_cut_at_every_byte(form: str, continues: bool) -> None:
    call, server, strategies = (
        FORMS[form](),
        ModelServer(continues=continues, tokens=5),
        dict[tuple[str, str], ContinuationStrategy](),
    )
    frames = server.frames(call)
    uncut = b"".join(frames)
    without_figures = []
    for cut in range(len(uncut)):
        data = drive(start_answer(call, strategies), call, server, [cut], first=uncut)
        if not check_whole(call, data, uncut):
            without_figures.append(cut)
    if form == "openai":
        usage = uncut.rindex(b"data: {")
        assert without_figures == list(range(usage, uncut.index(b"data: [DONE]")))
    else:
        assert not without_figures


@pytest.mark.parametrize("form", FORMS)
@given(st.data())
@settings(max_examples=60)
def test_several_cuts_anywhere_whatever_the_network_makes_of_the_bytes(form: str, data: st.DataObject) -> None:
    call = FORMS[form](options={"seed": data.draw(st.integers(0, 1000))}, seed=data.draw(st.integers(0, 1000)))
    server = ModelServer(continues=data.draw(st.booleans()), tokens=data.draw(st.integers(1, 30)))
    uncut = server.stream(call)
    cuts = data.draw(st.lists(st.integers(0, len(uncut) - 1), max_size=MAX_CUTS))
    answer = start_answer(call)
    out = drive(answer, call, server, cuts, piece=data.draw(st.integers(1, 700)))
    check_whole(call, out, uncut)
    assert answer.text == text(call, uncut)


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_without_a_cut_passes_byte_for_byte(form: str) -> None:
    call, server = FORMS[form](), ModelServer()
    stream = server.stream(call)
    answer = start_answer(call)
    assert b"".join(answer.feed(stream[at : at + 1]) for at in range(len(stream))) == stream
    assert answer.finished
    assert answer.counters is not None
    assert answer.counters.tokens == 8
    assert answer.answer_counters == answer.counters
    assert answer.feed(b"more") == b""


def test_half_a_frame_never_reaches_the_client() -> None:
    answer = start_answer(chat())
    line = '{"message":{"content":"größer 👩\u200d🚀"},"done":false}\n'.encode()
    for at in range(len(line) - 1):
        assert answer.feed(line[at : at + 1]) == b""
    assert answer.feed(line[-1:]) == line


def test_the_final_frame_has_figures_of_the_whole_answer_in_native_streams() -> None:
    call, server = chat(), ModelServer()
    frames = server.frames(call)
    data = drive(start_answer(call), call, server, [len(b"".join(frames[:3])) + 5])
    last = final(call, data)
    assert last["gpumesh"] == {"continued": 1, "tokens_before": 3}
    assert last["eval_count"] == 8
    assert last["total_duration"] >= last["eval_duration"] >= 5 * EVAL_NS
    assert last["model"] == "m"
    assert b"context" not in data


@pytest.mark.parametrize("continues", [True, False], ids=["continues", "closes"])
def test_the_final_frames_have_figures_of_the_whole_answer_in_openai_streams(continues: bool) -> None:
    call, server = openai(), ModelServer(continues=continues)
    frames = server.frames(call)
    data = drive(start_answer(call), call, server, [len(b"".join(frames[:3])) + 5])
    documents = [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: {")]
    assert documents[-1]["usage"]["completion_tokens"] == 8
    assert documents[-1]["usage"]["total_tokens"] == 8 + documents[-1]["usage"]["prompt_tokens"]
    assert documents[-1]["gpumesh"] == documents[-2]["gpumesh"] == {"continued": 1, "tokens_before": 3}
    assert documents[-2]["choices"][0]["finish_reason"] == "stop"
    names = {(document["id"], document["created"], document["model"], document["object"]) for document in documents}
    assert len(names) == 1


def test_without_include_usage_there_is_no_usage_after_a_continuation_either() -> None:
    for continues in (True, False):
        call, server = openai(stream_options=None), ModelServer(continues=continues)
        data = drive(start_answer(call), call, server, [len(b"".join(server.frames(call)[:3]))])
        assert b"usage" not in data
        assert text(call, data) == text(call, server.stream(call))


def test_a_generate_that_chat_continues_stays_a_generate() -> None:
    call, server = generate(), ModelServer(renders=False, repeats=True)
    data = drive(start_answer(call), call, server, [300])
    assert server.calls[-1].path == "/api/chat"
    for line in data.splitlines():
        assert "response" in json.loads(line)
        assert "message" not in json.loads(line)


def test_counters_are_the_last_servers_own_and_answer_counters_those_of_the_whole_answer() -> None:
    call, server = chat(), ModelServer()
    answer = start_answer(call)
    drive(answer, call, server, [len(b"".join(server.frames(call)[:3]))])
    assert answer.counters is not None
    assert answer.answer_counters is not None
    assert (answer.counters.tokens, answer.answer_counters.tokens) == (5, 8)


def test_a_last_frame_without_its_end_mark_counts_when_the_body_is_complete() -> None:
    for call in (chat(), openai()):
        stream = ModelServer().stream(call)
        answer = start_answer(call)
        out = answer.feed(stream.rstrip(b"\n"))
        assert not answer.finished
        out += answer.finish_body()
        assert answer.finished
        assert text(call, out) == text(call, stream)


@pytest.mark.parametrize("call", [chat(), openai()])
def test_half_a_frame_at_the_end_of_a_complete_body_is_a_cut(call: HttpCall) -> None:
    stream = ModelServer().stream(call)
    for end in range(len(stream) - 1):
        answer = start_answer(call)
        out = answer.feed(stream[:end])
        out += answer.finish_body()
        assert answer.finish_body() == b""
        assert stream.startswith(out.rstrip(b"\n"))
        for frame in out.split(answer.frame_separator):
            assert not frame.strip() or frame.endswith((b"}", b"[DONE]"))
        assert answer.finished == (out.rstrip() == stream.rstrip())


def test_done_without_a_reason_to_finish_is_a_cut() -> None:
    call, server = openai(), ModelServer()
    frames = server.frames(call)
    answer = start_answer(call)
    out = answer.feed(b"".join(frames[:2]))
    assert answer.feed(b"data: [DONE]\n\n") == b""
    assert answer.cut_reason is not None
    step = continue_on_node(answer, server)
    assert isinstance(step, HttpCall)
    out += answer.feed(server.stream(step))
    check_whole(call, out, b"".join(frames))


def test_frames_missing_after_the_text_are_added_without_another_node() -> None:
    call = openai(stream_options=None)
    stream = ModelServer().stream(call).removesuffix(b"data: [DONE]\n\n")
    answer = start_answer(call)
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
def test_an_error_in_mid_stream_is_not_passed_on_and_the_answer_is_continued(call: HttpCall, frame: bytes) -> None:
    server = ModelServer()
    frames = server.frames(call)
    answer = start_answer(call)
    out = answer.feed(b"".join(frames[:4]) + frame + frames[4])
    assert answer.cut_reason is not None
    assert "unexpectedly stopped" in answer.cut_reason
    assert answer.feed(frames[5]) == b""
    step = continue_on_node(answer, server)
    assert isinstance(step, HttpCall)
    check_whole(call, out + answer.feed(server.stream(step)), b"".join(frames))


def test_a_line_that_is_no_json_is_a_cut_when_it_is_read() -> None:
    answer = start_answer(chat())
    assert answer.feed(b'<html>"error"</html>\n') == b""
    assert answer.cut_reason == "a line that is no JSON"


def test_a_frame_without_an_end_does_not_fill_memory() -> None:
    answer = start_answer(chat())
    piece = b"x" * (1 << 20)
    for _ in range(17):
        answer.feed(piece)
    assert answer.cut_reason is not None
    assert "MiB" in answer.cut_reason


@pytest.mark.parametrize("call", [chat(), openai()])
def test_a_frame_in_small_pieces_costs_no_more_than_its_length(call: HttpCall) -> None:
    answer, piece = start_answer(call), b"x" * 500
    began = time.thread_time()
    for _ in range((LINE_LIMIT - 1) // len(piece)):
        assert answer.feed(piece) == b""
    assert time.thread_time() - began < 2.0
    assert answer.cut_reason is None


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\n\r\n", b"\r\n\n"])
def test_an_event_ends_however_its_lines_end_and_wherever_it_is_cut(end: bytes) -> None:
    events = b"".join(b'data: {"choices":[{"delta":{"content":"%d"}}]}' % number + end for number in range(3))
    for size in range(1, len(events) + 1):
        answer = start_answer(openai())
        got = [answer.feed(events[start : start + size]) for start in range(0, len(events), size)]
        assert b"".join(got) == events
        assert all(piece.endswith(b"\n") for piece in got if piece)
        assert answer.text == "012"


def test_an_event_of_thousands_of_lines_is_a_cut() -> None:
    answer = start_answer(openai())
    answer.feed(b'data: {"tool_calls":[]}\n' + b"data:\n" * 2 * MAX_EVENT_LINES + b"\n")
    assert answer.cut_reason == f"an event of more than {MAX_EVENT_LINES} lines"


def test_a_node_that_fails_before_its_first_frame_leaves_no_trace() -> None:
    call, server = chat(), ModelServer()
    frames = server.frames(call)
    answer = start_answer(call)
    out = answer.feed(b"".join(frames[:3]))
    assert isinstance(continue_on_node(answer, server), HttpCall)
    assert answer.feed(b'{"error":"cannot load"}\n') == b""
    assert answer.cut_reason == "cannot load"
    answer.abandon_upstream()
    assert answer.feed(b'{"mess') == b""
    answer.abandon_upstream()
    step = answer.next_call("n", OLLAMA)
    assert isinstance(step, HttpCall)
    check_whole(call, out + answer.feed(server.stream(step)), b"".join(frames))
    assert answer.cuts == 1


def test_before_any_text_the_same_request_is_sent_again() -> None:
    for call in (chat(), generate(), openai()):
        answer = start_answer(call)
        opening = b'data: {"id":"1","choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
        answer.feed(opening if call.path.startswith("/v1") else b'{"message":{"content":""},"done":false}\n')
        step = continue_on_node(answer, ModelServer())
        assert isinstance(step, HttpCall)
        assert (step.path, step.body) == (call.path, call.body)


def test_counters_of_anthropics_stream_come_from_its_first_and_its_last_event() -> None:
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 6, "cache_read_input_tokens": 20}}}
    delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}}
    answer = start_answer(HttpCall("POST", "/v1/messages", b'{"model":"m","stream":true,"messages":[]}'))
    for document in (start, delta, {"type": "message_stop"}):
        data = json.dumps(document, separators=(",", ":")).encode()
        answer.feed(b"event: " + str(document["type"]).encode() + b"\ndata: " + data + b"\n\n")
    assert answer.finished
    assert answer.counters == ServerCounters(prompt_tokens=26, tokens=5, cached_tokens=20)
    assert answer.answer_counters == answer.counters


def test_counters_are_searched_in_the_last_lines_only() -> None:
    figures = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":7}}\n\ndata: [DONE]\n\n'
    counters = find_counters(b"data: {}\n\n" * 1000 + figures)
    assert counters is not None
    assert counters.tokens == 7
    began = time.thread_time()
    assert find_counters(b"\n" * LINE_LIMIT) is None
    assert time.thread_time() - began < 1.0


def test_a_query_in_the_path_changes_nothing() -> None:
    for form, bare in ((chat, "/api/chat"), (openai, "/v1/chat/completions")):
        call = form()
        server = ModelServer()
        answer = Continuation(f"{bare}?trace=1", call.body, clock=Clock())
        out = answer.feed(b"".join(server.frames(call)[:3]))
        step = continue_on_node(answer, server)
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


@pytest.mark.parametrize("form", FORMS)
def test_frames_are_counted_once_however_they_come(form: str) -> None:
    call, server = FORMS[form](), ModelServer(tokens=20)
    stream = server.stream(call)
    separators = stream.count(b"\n\n" if form == "openai" else b"\n")
    for piece in (1, 7, 300, len(stream)):
        answer = start_answer(call)
        count = 0
        for start in range(0, len(stream), piece):
            answer.feed(stream[start : start + piece])
            if start % 3 == 0:
                count += answer.take_frame_count()
            if start % 5 == 0:
                assert answer.continuable or answer.finished  # reads what was kept
        assert answer.finished
        assert count + answer.take_frame_count() == separators
        assert answer.take_frame_count() == 0
