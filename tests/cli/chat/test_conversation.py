from __future__ import annotations

import json

import pytest

from gpumesh.backends.base import Message
from gpumesh.cli.chat.conversation import Conversation, read_conversation
from gpumesh.errors import UsageError


def test_a_saved_conversation_goes_on_as_it_was() -> None:
    talk = Conversation("qwen2.5:7b", "alpha", "Be brief.", {"temperature": 0.5}, "high")
    talk.add_exchange("Hello", "Hi \ud83d ü")
    read = read_conversation(talk.to_json(), "a.json")
    assert (read.model, read.system, read.options, read.think) == (
        "qwen2.5:7b",
        "Be brief.",
        {"temperature": 0.5},
        "high",
    )
    assert read.node is None, "the other mesh may have other nodes"
    assert read.messages == [Message("user", "Hello"), Message("assistant", "Hi ? ü")]
    request = read.make_request("More")
    assert [message.role for message in request.messages] == ["system", "user", "assistant", "user"]
    assert (request.model, request.think) == ("qwen2.5:7b", "high")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": None}, "has no schema"),
        ({"model": 5}, "wrong form"),
        ({"messages": [{"role": "user"}]}, "wrong form"),
        ({"messages": [{"role": "root", "content": "x"}]}, "wrong form"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "wrong form"),
        ({"messages": [{"role": "user", "content": "x", "images": [1]}]}, "wrong form"),
        ({"options": []}, "wrong form"),
        ({"think": 3}, "wrong form"),
    ],
)
def test_a_file_of_another_form_is_refused(change: dict[str, object], message: str) -> None:
    document = json.loads(Conversation("m").to_json()) | change
    with pytest.raises(UsageError, match=message):
        read_conversation(json.dumps(document), "a.json")


@pytest.mark.parametrize("text", ["", "x", "[]", "[" * 100_000, '"text"'])
def test_a_file_that_is_no_chat_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"a\.json is no saved chat"):
        read_conversation(text, "a.json")
