"""Bytes in, events out: the same events however the bytes are cut."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpumesh.gateway.http.parser import Event, Refusal, RequestEnd, RequestHead, RequestParser, RequestParserState
from tests.gateway.http.raw_clients import GET, UPGRADE

MAX_HEAD_BYTES = 2000
WHOLE, BROKEN = RequestEnd(whole=True), RequestEnd(whole=False)


def parse(pieces: Iterable[bytes], parser: RequestParser | None = None) -> list[Event]:
    """All events; the pieces of a body are joined where they follow each other."""
    parser = parser or RequestParser(MAX_HEAD_BYTES)
    events: list[Event] = []
    for piece in pieces:
        for event in parser.feed(piece):
            if isinstance(event, bytes) and events and isinstance(events[-1], bytes):
                events[-1] += event
            else:
                events.append(event)
    return events


def comparable(events: list[Event]) -> list[object]:
    return [
        (event.method, event.target, event.headers.pairs, event.is_http10, event.keep_alive)
        if isinstance(event, RequestHead)
        else event
        for event in events
    ]


def bodies(events: list[Event]) -> list[bytes]:
    return [event for event in events if isinstance(event, bytes)]


def request(*fields: str, method: str = "POST", target: str = "/", version: str = "1.1", body: bytes = b"") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/{version}", "Host: a", *fields, "", ""]).encode() + body


def chunked(*chunks: bytes, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    lines = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    return lines + b"0\r\n" + trailers + b"\r\n"


CHUNKED = "Transfer-Encoding: chunked"
OFFERS = st.sampled_from([(), tuple(UPGRADE.split("\r\n")[:2])])
TEXT = st.binary(max_size=40)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    offer = draw(OFFERS)
    more = draw(st.lists(st.sampled_from(["X-A: b", "Accept: \t */* ", "Connection: close", "X-Empty:"]), max_size=2))
    version = draw(st.sampled_from(["1.1", "1.1", "1.0"]))
    match draw(st.sampled_from(["none", "length", "chunks"])):
        case "none":
            data = request(*offer, *more, method=draw(st.sampled_from(["GET", "HEAD", "CONNECT"])), version=version)
        case "length":
            body = draw(TEXT)
            data = request(*offer, *more, f"Content-Length: {len(body)}", version=version, body=body)
        case _:
            chunks = [chunk for chunk in draw(st.lists(TEXT, max_size=4)) if chunk]
            trailers = draw(st.sampled_from([b"", b"X-T: 1\r\n", b"X-T: 1\r\nX-U:\r\n"]))
            body = chunked(*chunks, extension=draw(st.sampled_from([b"", b";a=b"])), trailers=trailers)
            data = request(*offer, *more, CHUNKED, version=version, body=body)
    return draw(st.sampled_from([b"", b"", b"\r\n"])) + data


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Some requests, of which some bytes may be lost, doubled or changed."""
    data = b"".join(draw(st.lists(requests(), min_size=1, max_size=4)))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(data)))
        until = at + draw(st.integers(0, 3))
        data = data[:at] + draw(st.binary(max_size=3)) + data[until:]
    return data


@given(streams(), st.lists(st.integers(0, 1000), max_size=20))
@example(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloXX", [58, 60])
def test_every_cut_of_the_input_gives_the_same_events(data: bytes, cuts: list[int]) -> None:
    at_once = comparable(parse([data]))
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    assert comparable(parse(data[a:b] for a, b in pairwise(places))) == at_once
    assert comparable(parse(data[at : at + 1] for at in range(len(data)))) == at_once


@given(st.binary(max_size=300), st.integers(1, 20))
def test_arbitrary_bytes_give_the_same_events_in_any_pieces(data: bytes, size: int) -> None:
    at_once = comparable(parse([data]))
    assert comparable(parse(data[at : at + size] for at in range(0, len(data), size))) == at_once


@given(st.lists(requests(), min_size=1, max_size=5))
def test_each_request_is_a_head_then_its_body_then_its_end(data: list[bytes]) -> None:
    """Unless the one before said that the connection ends after it."""
    events = parse([b"".join(data)])
    expected = ["head", "end"]
    kinds = [
        "head" if isinstance(event, RequestHead) else "end" if event == WHOLE else "other"
        for event in events
        if not isinstance(event, bytes)
    ]
    refused = kinds[-1] == "other"
    complete = kinds[:-1] if refused else kinds
    assert complete == expected * (len(complete) // 2)
    if refused:
        heads = [event for event in events if isinstance(event, RequestHead)]
        assert not heads[-1].keep_alive
    else:
        assert len(complete) == 2 * len(data)


def test_a_request_in_one_input() -> None:
    parser = RequestParser(MAX_HEAD_BYTES)
    head, body, end = parse([request("Content-Length: 5", "X-Blank: \t a b \t", body=b"hello")], parser)
    assert isinstance(head, RequestHead)
    assert (head.method, head.target, head.is_http10, head.keep_alive) == ("POST", "/", False, True)
    assert head.headers["x-blank"] == "a b"
    assert (body, end) == (b"hello", WHOLE)
    assert parser.state is RequestParserState.AWAITING_HEAD
    assert repr(parser) == "<RequestParser AWAITING_HEAD>"


def test_the_state_says_what_comes_next() -> None:
    parser = RequestParser(MAX_HEAD_BYTES)
    states = []
    for piece in (b"\r\n", b"G", b"ET / HTTP/1.1\r\n\r\n", request("Content-Length: 2"), b"a", b"b", b"\x00"):
        parser.feed(piece)
        states.append(parser.state.name)
    reading = ["READING_HEAD", "AWAITING_HEAD", "READING_BODY", "READING_BODY", "AWAITING_HEAD"]
    assert states == ["AWAITING_HEAD", *reading, "REFUSED"]
    assert parser.feed(GET) == []


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_body_behind_an_upgrade_offer_is_read_and_so_is_the_next_request(framing: str) -> None:
    offer = UPGRADE.split("\r\n")[:2]
    if framing == "length":
        data = request(*offer, f"Content-Length: {len(GET)}", body=GET)
    else:
        data = request(*offer, CHUNKED, body=chunked(GET[:5], GET[5:], trailers=b"X-T: 1\r\n"))
    events = parse([data * 2 + GET])
    assert bodies(events) == [GET, GET], "a body is never taken for a request"
    assert [event.method for event in events if isinstance(event, RequestHead)] == ["POST", "POST", "GET"]
    assert events[-1] == WHOLE


@pytest.mark.parametrize(
    "body",
    [b"zz\r\n", b"5\r\nabcdefgh\r\n0\r\n\r\n", b"-5\r\n", b"f" * 17 + b"\r\n", b"1\r\naXX", b"0\r\nno colon\r\n\r\n"],
)
@pytest.mark.parametrize("offer", [(), UPGRADE.split("\r\n")[:2]], ids=["", "offer"])
def test_a_broken_body_is_no_refusal(body: bytes, offer: list[str]) -> None:
    """The request has been accepted: its handler reports the body."""
    events = parse([request(*offer, CHUNKED, body=body) + GET])
    assert [type(event) for event in events if not isinstance(event, bytes)] == [RequestHead, RequestEnd]
    assert events[-1] == BROKEN


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"zyzzyva\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (request("Host: b"), 400),
        (request("Transfer-Encoding: gzip, chunked"), 400),
        (request("Content-Length: 1", CHUNKED), 400),
        (request("Content-Length: 1", "Content-Length: 1"), 400),
        (request("X: " + "a" * MAX_HEAD_BYTES), 431),
        (request(target="/" + "a" * MAX_HEAD_BYTES), 431),
        (request(*("X: 1" for _ in range(200))), 431),
        (b"\r\n" * MAX_HEAD_BYTES, 431),
        (b"GET / HTTP/1.1\r\nX:" + b" " * 2 * MAX_HEAD_BYTES, 431),
    ],
)
def test_what_is_no_request_is_refused_in_any_pieces(data: bytes, status: int) -> None:
    for size in (len(data), 100, 1):
        [refusal] = parse(data[at : at + size] for at in range(0, len(data), size))
        assert isinstance(refusal, Refusal)
        assert refusal.status == status


@pytest.mark.parametrize("offer", [(), UPGRADE.split("\r\n")[:2]], ids=["", "offer"])
@pytest.mark.parametrize("start", [b"0\r\nX: ", b"5;", b"0", b"0\r\n"])
def test_endless_framing_of_a_body_is_bounded(start: bytes, offer: list[str]) -> None:
    repeated = b"X: 1\r\n" if start == b"0\r\n" else b"0" if start == b"0" else b"a"
    parser = RequestParser(MAX_HEAD_BYTES)
    parse([request(*offer, CHUNKED, body=start)], parser)
    for _ in range(MAX_HEAD_BYTES // len(repeated) + 1):
        parser.feed(repeated)
    assert parser.state is RequestParserState.REFUSED


def test_one_input_gives_one_piece_of_a_body_however_many_chunks_it_has() -> None:
    parser = RequestParser(MAX_HEAD_BYTES)
    events = parser.feed(request(CHUNKED, body=chunked(*[b"a"] * 500)))
    assert bodies(events) == [b"a" * 500]
    assert parser.piece_count == 500, "what the input cost"
    parser.feed(GET)
    assert parser.piece_count == 0
