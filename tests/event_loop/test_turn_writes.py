from __future__ import annotations

import asyncio
import logging

import pytest

from gpumesh.event_loop.turn_writes import MAX_HELD_BYTES, TurnWrites


class Recorder:
    """A transport that records what is written to it."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closing = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def is_closing(self) -> bool:
        return self.closing


class BrokenTransport(Recorder):
    def write(self, data: bytes) -> None:
        raise OSError("no socket")


async def test_the_writes_of_a_turn_leave_together_after_all_that_is_ready() -> None:
    turn_writes, first, second = TurnWrites(), Recorder(), Recorder()
    loop = asyncio.get_running_loop()
    loop.call_soon(turn_writes.write, first, b"a")
    loop.call_soon(turn_writes.write, second, b"b")
    loop.call_soon(turn_writes.write, first, b"c")
    await asyncio.sleep(0)
    assert (first.writes, second.writes) == ([], [])
    assert (turn_writes.count_held(first), repr(turn_writes)) == (2, "<TurnWrites to 2 transports>")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (first.writes, second.writes) == ([b"ac"], [b"b"])
    turn_writes.write(first, b"d")
    await asyncio.sleep(0)
    assert first.writes == [b"ac", b"d"], "a later turn"


async def test_many_bytes_are_written_at_once_and_in_order() -> None:
    turn_writes, transport = TurnWrites(), Recorder()
    turn_writes.write(transport, b"a")
    turn_writes.write(transport, bytes(MAX_HELD_BYTES))
    assert transport.writes == [b"a" + bytes(MAX_HELD_BYTES)]
    turn_writes.write(transport, b"z")
    await asyncio.sleep(0)
    assert transport.writes[1:] == [b"z"]


async def test_flush_writes_now_and_a_closing_transport_gets_nothing() -> None:
    turn_writes, transport, closing = TurnWrites(), Recorder(), Recorder()
    turn_writes.write(transport, b"a")
    turn_writes.flush(transport)
    turn_writes.flush(transport)
    assert transport.writes == [b"a"]
    turn_writes.write(closing, b"b")
    closing.closing = True
    await asyncio.sleep(0)
    turn_writes.write(closing, b"c")
    turn_writes.flush(closing)
    assert (transport.writes, closing.writes) == ([b"a"], [])


async def test_an_error_of_one_transport_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    turn_writes, other = TurnWrites(), Recorder()
    turn_writes.write(BrokenTransport(), b"a")
    turn_writes.write(other, b"b")
    with caplog.at_level(logging.ERROR):
        await asyncio.sleep(0)
    assert other.writes == [b"b"]
    assert "no socket" in caplog.text
