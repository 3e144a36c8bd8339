import re

from gpumesh.backends.continuation.stream_format import (
    TextPieces,
    append_answer,
    client_began_answer,
    collect_texts,
    find_strings,
)

PATTERN = re.compile(rb'"content"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")')


def test_strings_are_found_with_their_escapes_and_only_where_the_key_is_a_key() -> None:
    frames = rb'{"content":"a \"content\":\"b\" \\"}{"content" : "\u00e9\n"}{"reasoning_content":"no"}{"content":null}'
    assert find_strings(PATTERN, frames) == TextPieces(('a "content":"b" \\', "é\n"))


def test_what_are_no_strings_of_json_is_left_to_a_closer_look() -> None:
    assert find_strings(PATTERN, rb'{"content":"\x"}') is None


def test_empty_pieces_are_no_tokens() -> None:
    assert find_strings(PATTERN, b'{"content":""}{"content":"x"}') == TextPieces(("x",))
    assert collect_texts([("", ""), ("a", ""), ("", "t"), ("b", "u")]) == TextPieces(("a", "b"), ("t", "u"))


def test_the_answer_is_a_message_of_its_own_unless_the_client_began_it() -> None:
    asked = [{"role": "user", "content": "x"}]
    assert append_answer(asked, "so far", "thinking", "") == [*asked, {"role": "assistant", "content": "so far"}]
    assert append_answer(asked, "so far", "thinking", "hm")[-1]["thinking"] == "hm"
    begun = [*asked, {"role": "assistant", "content": "It is ", "name": "n"}]
    assert append_answer(begun, "so", "thinking", "")[1:] == [{"role": "assistant", "content": "It is so", "name": "n"}]
    assert client_began_answer(begun)
    for messages in (asked, [], None, ["x"], [{"role": "assistant", "content": None}]):
        assert not client_began_answer(messages)
