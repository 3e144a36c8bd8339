from __future__ import annotations

import asyncio
import logging

import pytest

from gpumesh.event_loop.turn_end import TurnEnd


async def test_callbacks_run_once_after_all_that_is_ready() -> None:
    turn_end, calls = TurnEnd(), list[str]()
    loop = asyncio.get_running_loop()

    def run(name: str) -> None:
        calls.append(f"ready: {name}")
        turn_end.add(lambda: calls.append(f"turn end: {name}"))

    loop.call_soon(run, "first")
    loop.call_soon(run, "second")
    await asyncio.sleep(0)
    assert calls == ["ready: first", "ready: second"]
    assert repr(turn_end) == "<TurnEnd 2 callbacks>"
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert calls == ["ready: first", "ready: second", "turn end: first", "turn end: second"]


async def test_a_callback_that_a_callback_adds_belongs_to_the_next_turn() -> None:
    turn_end, calls = TurnEnd(), list[str]()

    def add_another() -> None:
        calls.append("first")
        turn_end.add(lambda: calls.append("second"))

    turn_end.add(add_another)
    await asyncio.sleep(0)
    assert calls == ["first"]
    await asyncio.sleep(0)
    assert calls == ["first", "second"]


async def test_an_error_of_one_callback_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    turn_end, calls = TurnEnd(), list[str]()

    def fail() -> None:
        raise OSError("no socket")

    turn_end.add(fail)
    turn_end.add(lambda: calls.append("other"))
    with caplog.at_level(logging.ERROR):
        await asyncio.sleep(0)
    assert calls == ["other"]
    assert "no socket" in caplog.text
