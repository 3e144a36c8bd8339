"""The decoders of bodies behind an upgrade offer, compared with llhttp, which frames all other bodies."""

from __future__ import annotations

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.gateway.http.bodies.body_framing import ChunkedDecoder, CountedDecoder, MalformedBody, create_body_decoder
from gpumesh.gateway.http.responses import Headers


class Body:
    """What llhttp makes of a chunked body."""

    def __init__(self) -> None:
        self.data = b""
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.data += data

    def on_message_complete(self) -> None:
        self.complete = True


def decode_with_llhttp(data: bytes) -> Body | None:
    """``None``: it is malformed."""
    body = Body()
    parser = httptools.HttpRequestParser(body)
    parser.feed_data(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
    try:
        for at in range(len(data)):
            parser.feed_data(data[at : at + 1])
            if body.complete:
                break
    except httptools.HttpParserError:
        return None
    return body


def decode(data: bytes, size: int) -> Body | None:
    body, decoder, pieces = Body(), ChunkedDecoder(), list[bytes]()
    try:
        for at in range(0, len(data), size):
            decoder.feed(data[at : at + size], pieces)
            if decoder.complete:
                break
    except MalformedBody:
        return None
    body.data, body.complete = b"".join(pieces), decoder.complete
    return body


LINES = st.sampled_from(
    [b"0", b"1", b"3", b"a", b"A", b"00", b"\r", b"\n", b"\r\n", b";", b"x=1", b" ", b"g", b"X: 1", b":", b"abc", b"\t"]
)


@given(st.lists(LINES, max_size=20).map(b"".join), st.integers(1, 9))
def test_what_is_decoded_here_llhttp_decodes_alike(data: bytes, size: int) -> None:
    """So nobody can hide a request in a body: where this decoder sees the end, llhttp sees it too."""
    body = decode(data, size)
    if body is not None and body.complete:
        reference = decode_with_llhttp(data)
        assert reference is not None
        assert (body.data, body.complete) == (reference.data, reference.complete)


@given(st.lists(st.binary(min_size=1, max_size=20)), st.integers(1, 9), st.binary(max_size=9))
def test_well_formed_chunks_are_decoded_and_what_follows_is_left(
    chunks: list[bytes], size: int, following: bytes
) -> None:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\nX-T: 1\r\n\r\n"
    body, decoder, pieces, data = decode(framed, size), ChunkedDecoder(), list[bytes](), framed + following
    assert body is not None
    assert (body.data, body.complete) == (b"".join(chunks), True)
    assert decoder.feed(data, pieces) == following
    assert decoder.complete
    assert b"".join(pieces) == b"".join(chunks)


@pytest.mark.parametrize(
    "data", [b"g\r\n", b"\r\n", b"1\n", b"1 \r\n", b"1\r\nab", b"1\r\na\n", b"0\r\nX\r\n", b"0\r\n X: 1\r\n"]
)
def test_malformed_chunks_are_refused(data: bytes) -> None:
    assert decode(data, 1) is None
    assert decode(data, len(data)) is None


def test_a_counted_body_ends_after_its_length() -> None:
    decoder, pieces = CountedDecoder(5), list[bytes]()
    assert decoder.feed(b"abc", pieces) == b""
    assert not decoder.complete
    assert decoder.feed(b"defg", pieces) == b"fg"
    assert decoder.complete
    assert pieces == [b"abc", b"de"]


@pytest.mark.parametrize(
    ("fields", "decoder"),
    [
        ((), None),
        ((("Content-Length", "0"),), None),
        ((("content-length", "000"),), None),
        ((("content-length", "0" * 5000 + "7"),), CountedDecoder),
        ((("Transfer-Encoding", "chunked"),), ChunkedDecoder),
    ],
)
def test_the_head_says_how_the_body_is_framed(fields: tuple[tuple[str, str], ...], decoder: type | None) -> None:
    created = create_body_decoder(Headers(fields))
    assert created is None if decoder is None else isinstance(created, decoder)
