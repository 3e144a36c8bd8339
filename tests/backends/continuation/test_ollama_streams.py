"""The native form by itself; with a model at the other end it is tested in test_continuation.py."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends.continuation.ollama_streams import OllamaStreamFormat
from gpumesh.backends.continuation.stream_format import SENTINEL, Frame, PartialAnswer, TextPieces

CHAT, GENERATE = OllamaStreamFormat(generate=False), OllamaStreamFormat(generate=True)
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "x"}], "keep_alive": "5m", "options": {"seed": 1}}


@given(st.lists(st.tuples(st.text(), st.sampled_from(["content", "thinking"])), max_size=20), st.booleans())
def test_reading_many_at_once_gives_what_reading_each_gives(pieces: list[tuple[str, str]], ascii_only: bool) -> None:
    lines = [
        json.dumps({"message": {"role": "assistant", key: text}, "done": False}, ensure_ascii=ascii_only)
        for text, key in pieces
    ]
    data = "".join(line + "\n" for line in lines).encode(errors="surrogatepass")
    frames = [CHAT.read(line + b"\n") for line in data.split(b"\n")]
    texts = tuple(frame.text for frame in frames if frame.text)
    thoughts = tuple(frame.thinking for frame in frames if frame.thinking)
    assert CHAT.extract_texts(data) == TextPieces(texts, thoughts)


@pytest.mark.parametrize(
    ("line", "plain"),
    [
        (b'{"message":{"content":"x"},"done":false}\n', True),
        (b'{"message":{"content":"it is \\"done\\":true"},"done":false}\n', True),
        (b'{"message":{"content":""},"done":true}\n', False),
        (b'{"message":{"content":""},"done" : true}\n', False),
        (b'{"error":"x"}\n', False),
        (b'{"message":{"tool_calls":[]},"done":false}\n', False),
    ],
)
def test_what_must_be_looked_at(line: bytes, plain: bool) -> None:
    assert (CHAT.find_marks(line) is None) is plain
    assert (CHAT.find_marks(b'{"message":{"content":"x"},"done":false}\n' + line) is None) is plain


def test_the_question_costs_a_server_that_does_not_know_it_one_token() -> None:
    call = CHAT.render_call(REQUEST, "")
    assert call is not None
    body = json.loads(call.body)
    assert body["_debug_render_only"] is True
    assert body["stream"] is False
    assert body["options"] == {"seed": 1, "num_predict": 1}
    assert body["messages"][-1] == {"role": "assistant", "content": SENTINEL}


def test_a_raw_prompt_keeps_what_concerns_the_model_and_nothing_of_the_chat() -> None:
    rest = CHAT.continue_raw_prompt(
        {**REQUEST, "think": False}, PartialAnswer(text="so far", tokens=2), "<user>x<assistant>"
    )
    body = json.loads(rest.call.body)
    assert rest.stream_format is CHAT
    assert rest.call.path == "/api/generate"
    assert body == {
        "model": "m",
        "keep_alive": "5m",
        "prompt": "<user>x<assistant>so far",
        "raw": True,
        "stream": True,
        "options": {"seed": 1},
    }


def test_a_generate_becomes_the_chat_that_its_server_makes_of_it() -> None:
    request = {"model": "m", "system": "s", "prompt": "p", "images": ["i"], "raw": False, "options": {"num_predict": 9}}
    body = json.loads(GENERATE.continue_assistant_message(request, PartialAnswer(text="so", tokens=4)).call.body)
    assert body["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "p", "images": ["i"]},
        {"role": "assistant", "content": "so"},
    ]
    assert body["options"] == {"num_predict": 5}
    assert not body.keys() & {"prompt", "system", "images", "raw"}


def test_no_figures_are_made_up() -> None:
    frame = CHAT.read(b'{"model":"other","message":{"content":""},"done":true,"done_reason":"stop"}\n')
    partial_answer = PartialAnswer(tokens=3, elapsed_ms=2.0, spent_ms=1.0, cuts=1, first_frame={"model": "m"})
    document = json.loads(CHAT.translate(frame, partial_answer))
    assert document["model"] == "m"
    assert "prompt_eval_count" not in document
    assert (document["eval_count"], document["eval_duration"], document["total_duration"]) == (3, 1_000_000, 2_000_000)


def test_a_frame_without_a_document_is_nothing() -> None:
    assert CHAT.translate(Frame(), PartialAnswer()) == b""
    assert CHAT.read(b"  \n") == Frame()
