from __future__ import annotations

import random
from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.prefixes import index as index_module
from gpumesh.balancer.prefixes.index import MAX_AGE_S, MAX_KEYS, MAX_SESSIONS, PrefixIndex
from gpumesh.balancer.prefixes.prints import BLOCK_ENDS, PromptPrint

KEY = ("m:latest", 8192)
OTHER_KEY = ("m:latest", 4096)
SIZE_OF_BLOCK = 512


def small_index() -> PrefixIndex:
    """An index that believes at first that a server keeps one prompt for each slot."""
    return PrefixIndex(sequences_per_slot=1, least_bytes=0)


def prompt_of(text: str, rest: int = 10) -> PromptPrint:
    """A prompt whose blocks are the letters of ``text``; ``rest`` bytes follow the last block."""
    blocks = tuple(hash(text[: end + 1]) for end in range(len(text)))
    return PromptPrint(blocks, BLOCK_ENDS[len(text) - 1] + rest)


def size_of(text: str) -> int:
    return BLOCK_ENDS[len(text) - 1]


def make_index(*nodes: str, slots: int = 2) -> PrefixIndex:
    index = small_index()
    for node in nodes:
        index.set_capacity(node, KEY, slots=slots, context_tokens=100_000)
    return index


def test_a_node_has_what_was_sent_to_it() -> None:
    index = make_index("a", "b", "c")
    index.add("a", KEY, prompt_of("system, first"), 0.0)
    index.add("b", KEY, prompt_of("system, other"), 1.0)
    found = index.match(KEY, prompt_of("system, first, next"))
    assert found == {"a": size_of("system, first"), "b": size_of("system, ")}
    assert index.match(KEY, prompt_of("nothing of this")) == {}
    assert index.match(OTHER_KEY, prompt_of("system, first, next")) == {}


def test_a_prompt_that_continues_another_takes_its_place() -> None:
    index = make_index("a", slots=2)
    index.add("a", KEY, prompt_of("other"), 0.0)
    for turn, text in enumerate(("one", "one two", "one two three", "one two three")):
        index.add("a", KEY, prompt_of(text), 1.0 + turn)
    assert repr(index) == "<PrefixIndex 1 nodes, 2 prompts, 17 blocks>"  # both begin with an o
    assert index.match(KEY, prompt_of("other")) == {"a": size_of("other")}


def test_a_continued_prompt_that_another_node_has_too_stays_there() -> None:
    index = make_index("a", "b", slots=1)
    for node in "ab":
        index.add(node, KEY, prompt_of("one"), 0.0)
    index.add("a", KEY, prompt_of("one two"), 1.0)
    index.add("a", KEY, prompt_of("x"), 2.0)
    assert index.match(KEY, prompt_of("one two")) == {"b": size_of("one")}
    index.forget("b")
    assert repr(index) == "<PrefixIndex 1 nodes, 1 prompts, 1 blocks>"


def test_a_node_holds_as_many_prompts_as_its_server_has_slots() -> None:
    index = make_index("a", slots=2)
    for number, text in enumerate(("first", "second", "first", "third")):
        index.add("a", KEY, prompt_of(text), float(number))
    assert index.match(KEY, prompt_of("first")) == {"a": size_of("first")}  # it was used again
    assert index.match(KEY, prompt_of("third")) == {"a": size_of("third")}
    assert index.match(KEY, prompt_of("second")) == {}


def test_a_node_holds_as_many_bytes_as_its_servers_context_has() -> None:
    index = small_index()
    index.set_capacity("a", KEY, slots=4, context_tokens=1000)  # 16,000 bytes
    for number in range(4):
        index.add("a", KEY, prompt_of(f"{number}" * 12), float(number))  # 6,154 bytes each
    held = [number for number in range(4) if index.match(KEY, prompt_of(f"{number}" * 12))]
    assert held == [2, 3]
    index.add("a", KEY, prompt_of("x" * 60), 5.0)  # larger than all of the cache: images have few tokens
    assert index.match(KEY, prompt_of("x" * 60)) == {"a": size_of("x" * 60)}
    assert index.match(KEY, prompt_of("3" * 12)) == {}


def test_bytes_per_token_can_be_passed_in() -> None:
    index = small_index()
    index.set_capacity("a", KEY, slots=4, context_tokens=1000, bytes_per_token=2.0)
    for number in range(2):
        index.add("a", KEY, prompt_of(f"{number}" * 12), float(number))
    assert index.match(KEY, prompt_of("0" * 12)) == {}


def test_a_smaller_capacity_drops_the_oldest_prompts() -> None:
    index = make_index("a", slots=3)
    for number, text in enumerate(("first", "second", "third")):
        index.add("a", KEY, prompt_of(text), float(number))
    index.set_capacity("a", KEY, slots=1, context_tokens=None)
    assert [bool(index.match(KEY, prompt_of(text))) for text in ("first", "second", "third")] == [False, False, True]


def test_an_unloaded_model_and_a_restarted_server_are_forgotten() -> None:
    index = make_index("a", "b")
    for node in "ab":
        for key in (KEY, OTHER_KEY):
            index.add(node, key, prompt_of("text"), 0.0)
            index.note_session(node, key, 7, 100)
    index.forget("a", KEY)
    assert (list(index.match(KEY, prompt_of("text"))), nodes_of(index, KEY, 7)) == (["b"], ["b"])
    assert (list(index.match(OTHER_KEY, prompt_of("text"))), nodes_of(index, OTHER_KEY, 7)) == (["a", "b"], ["b", "a"])
    index.forget("a")
    assert (list(index.match(OTHER_KEY, prompt_of("text"))), nodes_of(index, OTHER_KEY, 7)) == (["b"], ["b"])
    index.forget("b")
    index.forget("b")
    index.forget("c", KEY)
    assert repr(index) == "<PrefixIndex 0 nodes, 0 prompts, 0 blocks>"


def test_a_server_that_reads_again_is_believed_to_hold_less() -> None:
    index = make_index("a", slots=2)
    index.add("a", KEY, prompt_of("first "), 0.0)
    index.add("a", KEY, prompt_of("second"), 1.0)
    for _ in range(3):
        index.learn("a", KEY, prompt_bytes=4000, believed_bytes=3072, prompt_tokens=1000, read_tokens=1000)
    assert index.match(KEY, prompt_of("first ")) == {}
    assert index.match(KEY, prompt_of("second")) == {"a": size_of("second")}
    index.learn("b", KEY, prompt_bytes=4000, believed_bytes=3072, prompt_tokens=1000, read_tokens=1000)  # nobody


def test_a_cache_that_is_off_holds_nothing() -> None:
    index = make_index("a", slots=1)
    for _ in range(3):
        index.add("a", KEY, prompt_of("first"), 0.0)
        index.learn("a", KEY, prompt_bytes=4000, believed_bytes=3072, prompt_tokens=1000, read_tokens=1000)
    index.add("a", KEY, prompt_of("first"), 0.0)
    assert index.match(KEY, prompt_of("first")) == {}
    assert repr(index) == "<PrefixIndex 1 nodes, 0 prompts, 0 blocks>"


def test_what_was_not_used_for_an_hour_is_not_believed() -> None:
    index = make_index("a", "b", slots=8)
    for number in range(6):
        index.add("a", KEY, prompt_of(f"{number}"), 0.0)
    index.add("b", KEY, prompt_of("b"), MAX_AGE_S)
    assert index.match(KEY, prompt_of("0")) == {"a": SIZE_OF_BLOCK}
    index.add("b", KEY, prompt_of("b"), MAX_AGE_S + 1.0)
    assert [bool(index.match(KEY, prompt_of(f"{number}"))) for number in range(6)] == [False] * 4 + [True] * 2


def test_all_nodes_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_BLOCKS", 20)
    index = make_index("a", "b", slots=8)
    for number in range(8):
        index.add("ab"[number % 2], KEY, prompt_of(f"{number}" * 4), float(number))
    assert repr(index) == "<PrefixIndex 2 nodes, 5 prompts, 20 blocks>"
    assert [bool(index.match(KEY, prompt_of(f"{number}" * 4))) for number in range(8)] == [False] * 3 + [True] * 5


def test_the_keys_of_a_node_are_bounded() -> None:
    index = small_index()
    for context in range(MAX_KEYS + 1):
        index.add("a", ("m", context), prompt_of("text"), float(context))
        index.note_session("a", ("m", context), 7, 100)
    assert index.match(("m", 0), prompt_of("text")) == {}
    assert nodes_of(index, ("m", 0), 7) == []
    assert index.match(("m", 1), prompt_of("text")) == {"a": size_of("text")}


def test_the_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    index = make_index("a", "b", slots=2 * MAX_SESSIONS)
    for session in range(MAX_SESSIONS + 1):
        index.note_session("a", KEY, session, 100)
    assert (nodes_of(index, KEY, 0), nodes_of(index, KEY, 1)) == ([], ["a"])
    monkeypatch.setattr(index_module, "MAX_ALL_SESSIONS", MAX_SESSIONS)
    index.note_session("b", KEY, 2, 100)
    index.note_session("b", KEY, 1000, 100)
    assert (nodes_of(index, KEY, 1), nodes_of(index, KEY, 2), nodes_of(index, KEY, 1000)) == ([], ["b", "a"], ["b"])


def nodes_of(index: PrefixIndex, key: Hashable, session: int) -> list[str]:
    """The nodes that are believed to hold something of the session, the last one first."""
    return list(reversed(index.match_session(key, session, 1000)))


def test_a_session_is_on_the_nodes_that_had_its_requests() -> None:
    index = make_index("a", "b")
    for node in "aba":
        index.note_session(node, KEY, 7, 100)
    assert nodes_of(index, KEY, 7) == ["a", "b"]
    assert nodes_of(index, KEY, 8) == []
    assert nodes_of(index, OTHER_KEY, 7) == []


def test_a_session_counts_where_no_block_matches() -> None:
    index = make_index("a", "b", slots=2)
    index.note_session("a", KEY, 7, 900)
    index.add("b", KEY, prompt_of("text"), 0.0)
    new = prompt_of("another")
    assert index.match(KEY, new, 7) == {"a": 900}
    assert index.match(KEY, new) == index.match(KEY, new, 8) == index.match(OTHER_KEY, new, 7) == {}
    assert index.match(KEY, prompt_of("text"), 7) == {"b": size_of("text")}
    index.note_session("a", KEY, 7, 1 << 20)
    assert index.match(KEY, new, 7) == {"a": new.size}
    for session in (8, 9):  # the server has two slots
        index.note_session("a", KEY, session, 900)
    assert index.match(KEY, new, 7) == {}


def test_a_server_that_had_what_was_believed_to_be_gone_is_believed_to_hold_more() -> None:
    index = make_index("a", slots=1)
    texts = ("first ", "second")
    for number in range(8):
        prompt = prompt_of(texts[number % 2])
        believed_bytes = index.match(KEY, prompt).get("a", 0)
        index.learn("a", KEY, prompt_bytes=4000, believed_bytes=believed_bytes, prompt_tokens=1000, read_tokens=5)
        index.add("a", KEY, prompt, float(number))
    assert [index.match(KEY, prompt_of(text)) for text in texts] == [{"a": size_of(text)} for text in texts]


# -- against a model that stores each prompt by itself ---------------------------------------------------------------


class SimpleIndex:
    """The same index, with nothing shared: for each node its prompts, the oldest first."""

    def __init__(self, slots: dict[str, int]) -> None:
        self.slots = slots
        self.texts: dict[str, list[str]] = {node: [] for node in slots}

    def add(self, node: str, text: str) -> None:
        texts = self.texts[node]
        depth = max((_equal_letters(text, other) for other in texts), default=0)
        continued = text[:depth]
        if continued in texts:
            texts.remove(continued)
        texts.append(text)
        del texts[: -self.slots[node]]

    def match(self, text: str) -> dict[str, int]:
        depths = {node: max((_equal_letters(text, other) for other in texts), default=0)
                  for node, texts in self.texts.items()}  # fmt: skip
        return {node: BLOCK_ENDS[depth - 1] for node, depth in depths.items() if depth}


def _equal_letters(first: str, second: str) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


texts = st.text("ab", min_size=1, max_size=6)


@given(st.lists(st.tuples(st.sampled_from("xyz"), texts, texts, st.booleans()), max_size=40))
def test_the_index_holds_what_the_simple_one_holds(steps: list[tuple[str, str, str, bool]]) -> None:
    slots = {"x": 1, "y": 2, "z": 5}
    simple, index = SimpleIndex(slots), small_index()
    for node, count in slots.items():
        index.set_capacity(node, KEY, slots=count, context_tokens=1_000_000)
    for number, (node, text, question, forgets) in enumerate(steps):
        if forgets and number % 7 == 0:
            index.forget(node, KEY)
            simple.texts[node].clear()
        index.add(node, KEY, prompt_of(text), float(number))
        simple.add(node, text)
        assert index.match(KEY, prompt_of(question)) == simple.match(question)
        all_texts = [text for texts_of_node in simple.texts.values() for text in texts_of_node]
        prefixes = {text[:end] for text in all_texts for end in range(1, len(text) + 1)}
        assert repr(index) == f"<PrefixIndex 3 nodes, {len(all_texts)} prompts, {len(prefixes)} blocks>"
    for node in slots:
        index.forget(node)
    assert repr(index) == "<PrefixIndex 0 nodes, 0 prompts, 0 blocks>"


def test_conversations_over_many_nodes_stay_in_step_with_the_simple_index() -> None:
    rng = random.Random(5)
    slots = {f"n{number}": number % 4 + 1 for number in range(8)}
    simple, index = SimpleIndex(slots), small_index()
    for node, count in slots.items():
        index.set_capacity(node, KEY, slots=count, context_tokens=10_000_000)
    conversations = [rng.choice(("system A ", "system B")) for _ in range(20)]
    for step in range(800):
        which = rng.randrange(len(conversations))
        conversations[which] += "abcd"[rng.randrange(4)] * rng.randrange(1, 6)
        text, node = conversations[which], rng.choice(list(slots))
        assert index.match(KEY, prompt_of(text)) == simple.match(text)
        index.add(node, KEY, prompt_of(text), float(step))
        simple.add(node, text)
        if len(text) > 60:
            conversations[which] = "system A "
