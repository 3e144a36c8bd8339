"""Lines and events, however the network cut them up."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumesh.backends.frames import LINE_LIMIT, MAX_EVENT_LINES, EventSplitter, LineSplitter
from gpumesh.errors import ProbeError

CUTS = st.lists(st.integers(0, 400), max_size=8)


def pieces(data: bytes, places: list[int]) -> list[bytes]:
    cuts = sorted({min(place, len(data)) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(cuts)]


def lines_of(data: bytes, places: list[int]) -> list[bytes]:
    reader = LineSplitter()
    found = [line for piece in pieces(data, places) for line in reader.feed(piece)]
    rest = reader.take_rest()
    return [*found, rest] if rest else found


def events_of(data: bytes, places: list[int]) -> list[bytes]:
    reader = EventSplitter()
    found = [event for piece in pieces(data, places) for event in reader.feed(piece)]
    return [*found, *reader.take_rest()]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"a", [b"a"]),
        (b"a\n", [b"a"]),
        (b"a\r\nb\r\n", [b"a", b"b"]),
        (b"\n\na\n", [b"", b"", b"a"]),
        ("é\u2028x\n".encode(), ["é\u2028x".encode()]),
        (b"a\rb\n", [b"a\rb"]),
    ],
)
def test_lines(data: bytes, lines: list[bytes]) -> None:
    for place in range(len(data) + 1):
        assert lines_of(data, [place]) == lines
    assert lines_of(data, list(range(len(data)))) == lines, "byte by byte"


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data:a\n\ndata:  b\n\n", [b"a", b" b"]),
        (b"data: a\r\ndata: b\r\n\r\n", [b"a\nb"]),
        (b": keepalive\n\nevent: message_start\ndata: {}\n\n", [b"{}"]),
        (b"id: 1\nretry: 5\n\n\n\ndata: x\n\n", [b"x"]),
        (b"data: last, without its blank line", [b"last, without its blank line"]),
        (b'error: {"code":500}\n\n', [b'{"error":{"code":500}}']),
        (b"data\n\n", [b""]),
        (b"garbage\n\n", []),
    ],
)
def test_events(data: bytes, events: list[bytes]) -> None:
    for place in range(len(data) + 1):
        assert events_of(data, [place]) == events
    assert events_of(data, list(range(len(data)))) == events, "byte by byte"


@given(st.binary(max_size=400), CUTS)
def test_cuts_do_not_matter(data: bytes, places: list[int]) -> None:
    assert lines_of(data, places) == lines_of(data, [])
    assert events_of(data, places) == events_of(data, [])


def feed_mib(take: Callable[[bytes], object], piece: bytes) -> None:
    for _ in range((LINE_LIMIT >> 20) + 2):
        take(piece)


@pytest.mark.parametrize(
    ("take", "piece"),
    [
        (LineSplitter().feed, b"x" * (1 << 20)),
        (EventSplitter().feed, b"x" * (1 << 20)),
        (EventSplitter().feed, b"data: " + b"x" * (1 << 20) + b"\n"),
    ],
    ids=["a line", "an event's line", "an event of many lines"],
)
def test_what_has_no_end_does_not_fill_memory(take: Callable[[bytes], object], piece: bytes) -> None:
    with pytest.raises(ProbeError, match="8 MiB") as caught:
        feed_mib(take, piece)
    assert caught.value.finding_code == "wrong-server"


def test_many_short_pieces_cost_no_more_than_their_length() -> None:
    """Not one copy of the whole line for each piece of it."""
    reader = LineSplitter()
    for _ in range(200_000):
        reader.feed(b"x")
    (line,) = reader.feed(b"\n")
    assert len(line) == 200_000


@settings(max_examples=20)
@given(st.integers(1, 50))
def test_a_line_at_the_bound_passes(size: int) -> None:
    reader = LineSplitter(limit=size)
    assert reader.feed(b"x" * size + b"\n") == [b"x" * size]
    with pytest.raises(ProbeError):
        LineSplitter(limit=size).feed(b"x" * (size + 1))


def test_a_line_in_small_pieces_costs_no_more_than_its_length() -> None:
    """Of time and of memory: each byte is copied a few times, however many pieces came before it."""
    lines, piece, count = LineSplitter(), b"x" * 500, (LINE_LIMIT - 1) // 500
    tracemalloc.start()
    try:
        began = time.thread_time()
        for _ in range(count):
            lines.feed(piece)
        assert time.thread_time() - began < 2.0
        assert tracemalloc.get_traced_memory()[0] < 2 * LINE_LIMIT
    finally:
        tracemalloc.stop()
    assert lines.feed(b"\n") == [piece * count]


def test_an_event_of_many_lines_is_refused() -> None:
    with pytest.raises(ProbeError, match="event of more than"):
        EventSplitter().feed(b"data:\n" * (MAX_EVENT_LINES + 2))
    assert EventSplitter().feed(b"data:1\n" * MAX_EVENT_LINES + b"\n") == [b"\n".join([b"1"] * MAX_EVENT_LINES)]
