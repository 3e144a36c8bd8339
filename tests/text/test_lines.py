"""Lines of a byte stream, whatever pieces it comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.text.lines import LineBuffer, LineTooLong


@given(st.lists(st.sampled_from([b"a", b"bc", b"\n", b"d\ne", b"", b"\n\n"]), max_size=20))
def test_lines_do_not_depend_on_the_pieces(pieces: list[bytes]) -> None:
    buffer = LineBuffer()
    lines = [line for piece in pieces for line in buffer.feed(piece)]
    assert [*lines, buffer.take_partial()] == b"".join(pieces).split(b"\n")
    assert buffer.take_partial() == b""


def test_a_line_over_the_limit_is_an_error() -> None:
    buffer = LineBuffer(4)
    assert buffer.feed(b"abcd\nabcd") == [b"abcd"]
    with pytest.raises(LineTooLong):
        buffer.feed(b"e")
    with pytest.raises(LineTooLong):
        LineBuffer(4).feed(b"abcde\n")


def test_a_line_over_the_limit_is_cut_where_that_is_wanted() -> None:
    buffer = LineBuffer(4, cut=True)
    for _ in range(1000):
        assert buffer.feed(b"abcdef") == []
        assert repr(buffer) == "<LineBuffer 4 bytes of a partial line>"
    assert buffer.feed(b"g\nlonger\nno\n") == [b"abcd", b"long", b"no"]
