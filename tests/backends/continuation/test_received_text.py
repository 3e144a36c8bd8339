"""What is kept of an answer: its text and not its frames, within bounds."""

from __future__ import annotations

import json

import pytest

from gpumesh.backends.base import HttpCall
from gpumesh.backends.continuation.received_text import MAX_REPEATED_TOKENS, UNREAD_BYTES
from tests.backends.continuation.driving import check_whole, continue_on_node, drive, start_answer
from tests.backends.models import FORMS, ModelServer, chat, openai


@pytest.mark.parametrize("form", FORMS)
def test_a_long_answer_is_held_as_its_text_and_continued_from_there(form: str) -> None:
    call, server = FORMS[form](), ModelServer(tokens=1800)
    uncut = server.stream(call)
    assert len(uncut) > 2 * UNREAD_BYTES
    for cut in (UNREAD_BYTES + 100, len(uncut) - 900):
        check_whole(call, drive(start_answer(call), call, server, [cut], piece=4096), uncut)


def test_a_comment_before_the_first_chunk_does_not_name_the_answer() -> None:
    call, server = openai(), ModelServer(continues=False)
    frames = server.frames(call)
    answer = start_answer(call)
    out = answer.feed(b": ping\n\n") + answer.feed(b"".join(frames[:3]))
    step = continue_on_node(answer, server)
    assert isinstance(step, HttpCall)
    out += answer.feed(server.stream(step))
    assert (
        len({frame["id"] for line in out.splitlines() if line[:7] == b"data: {" for frame in [json.loads(line[6:])]})
        == 1
    )
    check_whole(call, out.removeprefix(b": ping\n\n"), b"".join(frames))


def test_an_answer_that_repeats_itself_is_not_continued() -> None:
    answer = start_answer(chat())
    line = b'{"message":{"content":" ha"},"done":false}\n'
    for _ in range(MAX_REPEATED_TOKENS - 1):
        answer.feed(line)
    assert answer.continuable
    answer.feed(line)
    ending = answer.handle_cut()
    assert ending is not None
    assert "it repeats itself" in (ending.error or "")


def test_an_answer_past_every_context_is_passed_on_but_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumesh.backends.continuation.received_text.TEXT_LIMIT", 2000)
    answer = start_answer(chat())
    line = json.dumps({"message": {"content": "x" * 100}, "done": False}).encode() + b"\n"
    for _ in range(3 * UNREAD_BYTES // len(line)):
        assert answer.feed(line) == line
    assert not answer.continuable
    assert answer.text == ""
    ending = answer.handle_cut()
    assert ending is not None
    assert "too long" in (ending.error or "")
