"""The parser of responses, with bytes only: the same response however it is cut into reads, and every bound."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.mesh.requests.connections.response_parser import (
    HEAD_BYTES,
    MAX_FIELDS,
    ResponseParser,
    ResponseParserState,
)
from tests.mesh.servers import LAST_CHUNK, chunk, chunked_head, whole_response

CHUNKED = chunked_head() + chunk(b"one\n") + chunk(b"two\n") + LAST_CHUNK


def parse(*reads: bytes, bodiless: bool = False) -> tuple[ResponseParser, bytes]:
    parser = ResponseParser()
    parser.begin(bodiless=bodiless)
    return parser, b"".join(parser.feed(read) for read in reads)


@given(st.lists(st.integers(0, len(CHUNKED)), max_size=12))
def test_a_response_is_the_same_however_it_is_cut_into_reads(places: list[int]) -> None:
    cuts = sorted({*places, 0, len(CHUNKED)})
    parser, body = parse(*(CHUNKED[start:end] for start, end in itertools.pairwise(cuts)))
    assert body == b"one\ntwo\n"
    assert (parser.state, parser.reusable) == (ResponseParserState.COMPLETE, True)
    assert parser.head is not None
    assert (parser.head.status, parser.head.content_length) == (200, None)


_ODD_READS = [
    b"05\r\nhello\r\n",
    b"5;x=y\r\nhello\r\n",
    b"5 \r\nhello\r\n",
    b"A\r\n0123456789\r\n",
    b"a\r\n0123456789\r\n",
    b"+5\r\nhello\r\n",
    b"4\r\nhello\r\n",
    b"2\r\n\r\n\r\n",
    b"3\r\nab",
    b"c\r\n",
    b"\r\n",
    b"0\r\n",
    b"0\r\nX-Trailer: 1\r\n\r\n",
    LAST_CHUNK,
    chunk(b"one\n"),
    chunk(b"two\r\n"),
    chunk(b"a") + chunk(b"b"),
    chunk(b"x" * 4_500),
]


@given(st.lists(st.sampled_from(_ODD_READS), max_size=6))
def test_reads_of_whole_chunks_are_parsed_as_single_bytes_are(reads: list[bytes]) -> None:
    whole, whole_body = parse(chunked_head(), chunk(b"first"), *reads)
    single, single_body = parse(chunked_head(), chunk(b"first"), *(bytes([byte]) for byte in b"".join(reads)))
    if ResponseParserState.INVALID in (whole.state, single.state):  # how much of the body came before: either way
        assert whole.state is single.state
        assert whole_body.startswith(single_body) or single_body.startswith(whole_body)
    else:
        assert (whole.state, whole_body, whole.reusable) == (single.state, single_body, single.reusable)


def test_a_size_that_has_begun_is_no_place_for_a_whole_chunk() -> None:
    """The rest of a size can look like the begin of a smaller chunk."""
    for reads in ([b"2\r\nab\r\n1", b"3\r\nabc\r\n"], [b"1", b"3\r\nabc\r\n"]):
        parser, body = parse(chunked_head(), chunk(b"first"), *reads)
        assert body.endswith(b"abc\r\n"), "the begin of a chunk of 19 bytes"
        assert parser.state is ResponseParserState.BODY


def test_the_states_of_a_response() -> None:
    parser, body = parse(chunked_head())
    assert (parser.state, body) == (ResponseParserState.BODY, b"")
    assert repr(parser) == "<ResponseParser BODY>"
    assert parser.feed(chunk(b"one\n")) == b"one\n"
    assert parser.piece_count == 1
    assert parser.feed(chunk(b"a") * 3) == b"aaa"
    assert parser.piece_count == 3
    assert parser.feed(LAST_CHUNK) == b""
    assert parser.state is ResponseParserState.COMPLETE
    parser.begin(bodiless=False)
    assert parser.feed(whole_response(b"{}", status="404 Not Found")) == b"{}"
    assert parser.head is not None
    assert (parser.head.status, parser.head.content_length) == (404, 2)


@pytest.mark.parametrize("more", [whole_response(b"evil"), b"rubbish", b"\x00"])
def test_bytes_after_the_end_are_no_body_and_the_connection_is_not_reusable(more: bytes) -> None:
    parser, body = parse(whole_response(b"{}") + more)
    assert (parser.state, body, parser.reusable) == (ResponseParserState.COMPLETE, b"{}", False)
    parser, body = parse(CHUNKED + more)
    assert (parser.state, body, parser.reusable) == (ResponseParserState.COMPLETE, b"one\ntwo\n", False)


def test_a_response_to_head_ends_with_its_head() -> None:
    parser, body = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", bodiless=True)
    assert (parser.state, body, parser.reusable) == (ResponseParserState.COMPLETE, b"", False)


def test_only_a_body_without_a_length_is_complete_when_the_input_ends() -> None:
    parser, body = parse(b"HTTP/1.1 200 OK\r\n\r\nto the end")
    assert (parser.state, body) == (ResponseParserState.BODY, b"to the end")
    parser.end_input()
    assert (parser.state, parser.reusable) == (ResponseParserState.COMPLETE, False)
    for unfinished in (chunked_head() + chunk(b"x"), b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", b"HTTP/1.1 2"):
        parser, _ = parse(unfinished)
        state = parser.state
        parser.end_input()
        assert parser.state is state is not ResponseParserState.COMPLETE


def test_an_interim_response_is_passed_over() -> None:
    parser, body = parse(b"HTTP/1.1 100 Continue\r\nX-Interim: 1\r\n\r\n" * 3 + whole_response(b"{}"))
    assert body == b"{}"
    assert parser.head is not None
    assert b"X-Interim" not in dict(parser.head.fields)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "what it says is not HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * (MAX_FIELDS + 1) + b"\r\n", f"more than {MAX_FIELDS} fields"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * (HEAD_BYTES + 1) + b"\r\n\r\n", "64 KiB"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * (HEAD_BYTES + 1), "64 KiB"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * (HEAD_BYTES // 25 + 1), "64 KiB of its answer are no body"),
        (chunked_head() + b"1;" + b"x" * (HEAD_BYTES + 1), "64 KiB of its answer are no body"),
        (chunked_head() + chunk(b"body") + b"no chunk\r\n", "what it says is not HTTP"),
    ],
)
def test_what_is_no_response_or_past_a_bound_is_invalid(data: bytes, problem: str) -> None:
    parser, body = parse(*(data[start : start + 8192] for start in range(0, len(data), 8192)))
    assert parser.state is ResponseParserState.INVALID
    assert problem in (parser.problem or "")
    assert body in (b"", b"body"), "what came before the problem is not lost"
    assert not parser.reusable
