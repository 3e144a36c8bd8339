"""The print of a prompt depends on nothing but the prompt, and grows with the conversation."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.prefixes import PromptHasher, PromptPrint
from gpumesh.balancer.prefixes.prints import BLOCK_ENDS, STEP_BYTES, count_blocks
from gpumesh.gateway.body_parsers.json_members import SMALL_BODY_BYTES, Members, read_small_members, scan_members
from gpumesh.gateway.model_requests import MODEL_ROUTES
from gpumesh.gateway.prompt_reading import MAX_HINT_BYTES, MAX_METADATA_BYTES, PromptReader

T = TypeVar("T")
READER = PromptReader(PromptHasher(b"secret of a test"))
KEY = ("m:latest", 8192)
CHAT = "/api/chat"


def finish(steps: Generator[None, None, T]) -> T:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result


def members_of(body: bytes) -> Members:
    return read_small_members(body) or finish(scan_members(body))


def read(path: str, document: Any, **layout: Any) -> PromptPrint | None:
    """The print of the document as a body, read in one step and in many."""
    members = members_of(json.dumps(document, **layout).encode())
    prompt = READER.read_prompt(MODEL_ROUTES[path], members, KEY)
    assert finish(READER.scan_prompt(MODEL_ROUTES[path], members, KEY)) == prompt
    return prompt


def read_long(path: str, document: Any, **layout: Any) -> PromptPrint:
    prompt = read(path, document, **layout)
    assert prompt is not None
    return prompt


def text_of(size: int, name: str = "word") -> str:
    return " ".join(f"{name}{number}" for number in range(size // 4))[:size]


def chat(*contents: str, **more: Any) -> dict[str, Any]:
    """A conversation in which user and assistant take turns after the system's message."""
    roles = ["system"] + ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"model": "m", "messages": messages, **more}


def count_equal(first: PromptPrint, second: PromptPrint) -> int:
    return sum(a == b for a, b in zip(first.blocks, second.blocks, strict=False))


@pytest.mark.parametrize("layout", [{}, {"separators": (",", ":")}, {"indent": 4}, {"ensure_ascii": False}])
@given(contents=st.lists(st.text(min_size=1, max_size=900), min_size=2, max_size=9), data=st.data())
def test_the_next_turn_of_a_conversation_has_all_blocks_of_the_last(
    layout: dict[str, Any], contents: list[str], data: st.DataObject
) -> None:
    turns = data.draw(st.integers(1, len(contents) - 1))
    last, next_turn = read(CHAT, chat(*contents[:turns]), **layout), read(CHAT, chat(*contents), **layout)
    if last is not None:
        assert next_turn is not None
        assert next_turn.blocks[: len(last.blocks)] == last.blocks


def test_the_end_of_the_list_of_messages_belongs_to_no_block() -> None:
    """The last block of the first prompt ends exactly with its last message."""
    for indent in (None, 4):
        size_of_rest = read_long(CHAT, chat(text_of(1000)), indent=indent).size - 1000
        content = text_of(BLOCK_ENDS[3] - size_of_rest)
        first, second = (read_long(CHAT, document, indent=indent) for document in (chat(content), chat(content, "x")))
        assert (first.size, len(first.blocks)) == (BLOCK_ENDS[3], 4)
        assert second.blocks[:4] == first.blocks


@pytest.mark.parametrize("path", ["/api/generate", "/v1/completions"])
def test_a_longer_text_has_all_blocks_of_a_shorter_one(path: str) -> None:
    text = text_of(3000)
    for size in range(2030, 2060):
        short = read_long(path, {"model": "m", "prompt": text[:size]})
        assert read_long(path, {"model": "m", "prompt": text}).blocks[: len(short.blocks)] == short.blocks
        assert len(short.blocks) == count_blocks(size + len(b'\0prompt\0"'))


def test_members_that_are_no_prompt_do_not_matter() -> None:
    document = chat(text_of(2000), "x")
    first = {"stream": True, **document, "options": {"seed": 1}, "keep_alive": 5}
    second = {"MESSAGES": document["messages"], "tools": [], "think": None, "model": "m"}
    assert read(CHAT, first) == read(CHAT, second) == read(CHAT, document)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/api/chat", ["tools", "messages"]),
        ("/api/generate", ["context", "system", "images", "prompt"]),
        ("/v1/chat/completions", ["tools", "functions", "messages"]),
        ("/v1/completions", ["prompt"]),
        ("/v1/responses", ["instructions", "tools", "input"]),
        ("/v1/messages", ["system", "tools", "messages"]),
    ],
)
def test_members_are_read_in_the_order_in_which_they_are_rendered(path: str, names: list[str]) -> None:
    """Whatever their order in the body: a change of one member leaves the blocks of all members before it."""
    values = {name: [text_of(1500, name)] for name in names}
    prompt = read_long(path, dict(reversed(values.items())))
    sizes = [len(f"\0{name}\0") + len(json.dumps(value)) for name, value in values.items()]
    assert prompt.size == sum(sizes) - 1  # without the last bracket
    for number, name in enumerate(names):
        other = read_long(path, {**values, name: [text_of(1500, "other")]})
        assert count_equal(prompt, other) == count_blocks(sum(sizes[:number]) + len(f'\0{name}\0["'))


@pytest.mark.parametrize("path", ["/api/embed", "/v1/embeddings", "/api/show", "/v1/audio/transcriptions"])
def test_routes_whose_prompts_no_server_keeps_have_no_print(path: str) -> None:
    text = text_of(3000)
    assert read(path, {"model": "m", "input": text, "prompt": text, "messages": [text]}) is None


@pytest.mark.parametrize("document", [{}, chat("short"), {"messages": None}, {"messages": []}, {"messages": 5}])
def test_a_short_prompt_and_no_prompt_have_no_print(document: dict[str, Any]) -> None:
    assert read(CHAT, document) is None


def test_a_member_is_not_taken_for_another() -> None:
    text = text_of(1500)
    as_system = read_long("/api/generate", {"system": text})
    as_prompt = read_long("/api/generate", {"prompt": text})
    assert count_equal(as_system, as_prompt) == 0


def test_blanks_without_end_are_only_a_longer_prompt() -> None:
    body = b'{"messages":["' + b"x" * 600 + b'"' + b" " * 20_000 + b"]}"
    prompt = READER.read_prompt(MODEL_ROUTES[CHAT], members_of(body), KEY)
    assert prompt is not None
    assert 20_000 < prompt.size < 20_700


def test_a_large_body_is_read_in_steps() -> None:
    body = json.dumps(chat(text_of(1 << 20))).encode()
    assert len(body) > SMALL_BODY_BYTES
    steps = READER.scan_prompt(MODEL_ROUTES[CHAT], members_of(body), KEY)
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            assert len(stop.value.blocks) == 203
            break
        count += 1
    assert count >= (1 << 20) // STEP_BYTES


# -- the conversation's name -----------------------------------------------------------------------------------------

ANTHROPIC = {"metadata": {"user_id": "user_1_session_2"}}


def session(document: Any, **headers: str) -> int | None:
    return READER.read_session(headers, members_of(json.dumps(document).encode()))


def test_the_first_hint_counts() -> None:
    header = {"x-gpumesh-session": "s"}
    everything = {"user": "u", "prompt_cache_key": "k", **ANTHROPIC}
    assert session(everything, **header) == session({}, **header) != session({}, **{"x-gpumesh-session": "t"})
    assert session(everything) == session({"prompt_cache_key": "k"}) != session({"prompt_cache_key": "l"})
    assert session({"user": "u", **ANTHROPIC}) == session(ANTHROPIC) != session({"metadata": {"user_id": "other"}})
    assert session({"user": "u", "metadata": {"x": 1}}) == session({"user": "u"}) != session({"user": "v"})
    assert len({session({}, **header), session({"user": "s"}), session({"user": "u"}), session(ANTHROPIC)}) == 4


@pytest.mark.parametrize("name", [None, "", 5, ["x"], {"a": "b"}, "x" * MAX_HINT_BYTES])
def test_a_hint_that_is_no_name_is_none(name: object) -> None:
    assert session({"user": name, "prompt_cache_key": name, "metadata": {"user_id": name}}) is None
    assert session({"metadata": name}) is None


def test_metadata_that_cannot_be_read_is_no_hint() -> None:
    for metadata in (
        b"[",
        b"{" * 300,
        b'{"user_id":"\xff"',
        b'{"user_id":"u","x":"' + b"x" * MAX_METADATA_BYTES + b'"}',
    ):
        assert READER.read_session({}, Members([("metadata", metadata)])) is None


def test_an_empty_header_is_no_hint_and_a_long_or_broken_one_is_bounded() -> None:
    assert session({}, **{"x-gpumesh-session": ""}) is None
    assert session({"user": "u"}, **{"x-gpumesh-session": ""}) == session({"user": "u"})
    assert session({}, **{"x-gpumesh-session": "\udcff" * 5000}) is not None


def test_a_body_may_have_a_hint_twice() -> None:
    members = members_of(b'{"model":"m","user":"a","user":"b"}')
    assert READER.read_session({}, members) == session({"user": "b"})


@given(st.binary(max_size=200), st.sampled_from(sorted(MODEL_ROUTES)))
def test_no_value_crashes_the_reader(value: bytes, path: str) -> None:
    route = MODEL_ROUTES[path]
    members = Members([(name, memoryview(value)) for name in {*route.prompt_members, "metadata", "user"}])
    assert READER.read_prompt(route, members, KEY) == finish(READER.scan_prompt(route, members, KEY))
    READER.read_session({}, members)
