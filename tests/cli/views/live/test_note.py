from __future__ import annotations

import asyncio

import pytest

from gpumesh.cli.views.live import note
from gpumesh.cli.views.live.note import Note


async def test_a_note_disappears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(note, "NOTE_SHOWN_S", 0.0)
    changed = asyncio.Event()
    shown = Note(changed.set)
    shown.show("sorted by name")
    assert shown.text == "sorted by name"
    changed.clear()
    await asyncio.wait_for(changed.wait(), 5)
    assert shown.text == ""


async def test_a_closed_note_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(note, "NOTE_SHOWN_S", 0.0)
    shown = Note(lambda: None)
    shown.show("drain a")
    shown.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert shown.text == "drain a"
