"""The sink that holds a body for a reader: its bound, its end, and who is called when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gpumesh.event_loop.wakeup import Wakeup
from gpumesh.mesh.requests.body_sink import BUFFER_BYTES, BufferedSink


def test_what_was_written_is_taken_in_order_whole_or_in_parts() -> None:
    sink = BufferedSink()
    for piece in (b"one", b"two", b"three"):
        sink.write(piece)
    assert (len(sink), sink.take(4), sink.take()) == (11, b"onet", b"wothree")
    assert (len(sink), sink.take()) == (0, b"")
    sink.write(b"x")
    sink.discard()
    assert not sink


def test_past_its_bound_it_is_backpressured_until_enough_was_taken() -> None:
    calls: list[str] = []
    sink = BufferedSink()
    sink.on_writable = lambda: calls.append("writable")
    sink.write(b"x" * BUFFER_BYTES)
    assert not sink.backpressured
    sink.write(b"xy")
    assert sink.backpressured
    sink.take(1)
    assert sink.backpressured
    assert calls == []
    sink.take(1)
    assert not sink.backpressured
    assert calls == ["writable"]
    sink.take()
    assert calls == ["writable"], "once"


def test_its_end_and_its_repr() -> None:
    sink = BufferedSink()
    sink.write(b"abc")
    assert repr(sink) == "<BufferedSink 3 bytes>"
    sink.finish()
    assert (sink.ended, sink.problem, repr(sink)) == (True, None, "<BufferedSink 3 bytes complete>")
    sink = BufferedSink()
    sink.fail("it was reset")
    assert (sink.ended, sink.problem, repr(sink)) == (
        True,
        "it was reset",
        "<BufferedSink 0 bytes failed: it was reset>",
    )


async def test_each_change_wakes_the_reader() -> None:
    changed = Wakeup()
    changed.wake()  # nobody waits: nothing is kept of it
    sink = BufferedSink(changed)
    changes: list[Callable[[], None]] = [lambda: sink.write(b"x"), sink.finish, lambda: sink.fail("x"), changed.wake]
    for change in changes:
        reader = asyncio.create_task(sink.wait_changed())
        await asyncio.sleep(0)
        assert not reader.done()
        change()
        changed.wake()  # a second one before the reader ran
        await reader
