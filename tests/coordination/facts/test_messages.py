"""Messages with facts: what was encoded is decoded, and what is no message is refused."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpumesh.coordination.facts import messages
from gpumesh.coordination.facts.messages import (
    LearnedFigures,
    LearnedQuestion,
    Message,
    PlacedPrompt,
    PlacedPrompts,
    Presence,
    ServerChange,
)
from tests.absurd_answers import ABSURD, Raw, json_bytes

SERVER = messages.hash_server("home", "ollama 11434 GPU-1")
PRESENCE = Presence("laptop", 4711, "1.0", 1_790_000_000.0, 2, 1, (SERVER,))


@pytest.mark.parametrize(
    "message",
    [
        PRESENCE,
        ServerChange(SERVER, is_up=False),
        LearnedQuestion({SERVER: 0.0}),
        PlacedPrompts("0" * 32, (PlacedPrompt(SERVER, "m", None, (("a", 1.5), ("b", "c")), 1024, bytes(16)),)),
        LearnedFigures(SERVER, 1.0, "0.12.6", msgspec.Raw(b'{"format":1}'), msgspec.Raw(b"{}")),
    ],
)
def test_a_message_decodes_to_what_was_encoded(message: Message) -> None:
    assert messages.decode(messages.encode(message)) == message


def change(**members: object) -> str:
    return json.dumps({**json.loads(messages.encode(PRESENCE)), **members})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\ud800",
        "[]",
        "[" * 10_000,
        '{"type":"presence"}',
        change(type="unheard of"),
        change(host="x" * 101),
        change(pid=-1),
        change(in_flight=True),
        change(in_flight=10**10),
        change(since="NaN"),
        change(since=1e300),
        change(drained=["GPU-1"]),
        change(drained=[SERVER] * 1001),
        change(host="x" * messages.MAX_CHARS),
        messages.encode(LearnedFigures(SERVER, 1.0, None, msgspec.Raw(b'"%s"' % (b"x" * 70_000)), msgspec.Raw(b"1"))),
    ],
)
def test_text_that_is_no_message_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        messages.decode(text)


def test_a_member_that_is_not_known_is_passed_over() -> None:
    assert messages.decode(change(mood="good")) == PRESENCE


@given(st.text(max_size=200))
def test_garbage_raises_nothing_else(text: str) -> None:
    with pytest.raises(ValueError):
        messages.decode(text)


@given(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["presence", "server", "question", "learned", "prompts"])},
        optional=dict.fromkeys(
            ("host", "pid", "since", "drained", "server", "servers", "rates", "limits", "prompts", "prompt_secret"),
            ABSURD,
        ),
    )
)
@example({"type": "question", "servers": {SERVER: Raw("1" * 5000)}})
@example({"type": "question", "servers": {"x" * 32: 1.0}})
def test_an_absurd_message_raises_nothing_else(message: Any) -> None:
    try:
        messages.decode(json_bytes(message).decode())
    except ValueError:
        return


def test_the_hash_of_a_server_differs_by_mesh_and_key() -> None:
    assert len({messages.hash_server(mesh, key) for mesh in ("a", "b") for key in ("GPU-1", "GPU-2", "\udcff")}) == 6
