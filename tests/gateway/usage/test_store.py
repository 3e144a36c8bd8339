"""The store loses no count and counts none twice, wherever its process ends."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from gpumesh.gateway.usage.counts import UsageCounts
from gpumesh.gateway.usage.journal import UsageKey, UsageRow
from gpumesh.gateway.usage.store import MAX_JOURNAL_SIZE, UsageStore, open_store, read_rows

TODAY = "2026-11-30"


def row(tokens: int, *, day: str = TODAY, key: str = "chat", model: str = "m", node: str = "a") -> UsageRow:
    return UsageKey(day, key, model, node), UsageCounts(requests=1, prompt_tokens=1, answer_tokens=tokens, gpu_s=0.5)


def tokens(path: Path, since: str = "2026-01-01", key: str | None = None) -> int:
    sums = read_rows(path, ("key",), since=since, key=key)
    return sum(counts.answer_tokens for counts in sums.values())


def test_counts_are_read_from_the_journal_and_from_the_database(tmp_path: Path) -> None:
    path = tmp_path / "usage" / "u.sqlite"
    assert read_rows(path, ("key",), since=TODAY) == {}
    store = UsageStore(path)
    store.append([row(10), row(5, key="night")])
    assert tokens(path) == 15
    assert store.fold()
    assert not store.fold()
    assert tokens(path) == 15
    store.append([row(1), row(2, day="2026-10-31")])
    assert (tokens(path), tokens(path, since="2026-11-01"), tokens(path, key="night")) == (18, 16, 5)
    assert store.read_tokens("chat", "2026-11") == 13  # two prompts of one token
    assert store.read_tokens("chat", "2026-10") == 3
    assert store.read_tokens("nobody", "2026-11") == 0
    sums = read_rows(path, ("day", "key"), since="2026-01-01")
    assert sums[TODAY, "chat"] == UsageCounts(requests=2, prompt_tokens=2, answer_tokens=11, gpu_s=1.0)
    store.remove_before("2026-11-01")
    store.fold()
    store.close()
    assert {name.stat().st_mode & 0o777 for name in path.parent.iterdir()} == {0o600}
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_killed_process_loses_nothing_and_counts_nothing_twice(tmp_path: Path) -> None:
    path, journal = tmp_path / "u.sqlite", tmp_path / "u.sqlite.journal"
    killed = UsageStore(path)  # neither folds nor closes
    killed.append([row(10)])
    killed.append([row(3)])
    unfolded = journal.read_bytes()
    assert tokens(path) == 13
    UsageStore(path).close()  # the next process folds what it finds
    assert tokens(path) == 13
    assert journal.stat().st_size == 0
    journal.write_bytes(unfolded)  # as if it had been killed after the commit, before the journal was emptied
    assert tokens(path) == 13
    UsageStore(path).close()
    assert tokens(path) == 13
    again = UsageStore(path)
    again.append([row(100)])
    assert tokens(path) == 113
    again.close()


def test_a_line_that_a_full_disk_has_cut_is_left_out(tmp_path: Path) -> None:
    path, journal = tmp_path / "u.sqlite", tmp_path / "u.sqlite.journal"
    store = UsageStore(path)
    store.append([row(10)])
    whole = journal.read_bytes()
    for cut in range(len(whole) - 1):
        journal.write_bytes(whole + whole[:cut])
        assert tokens(path) == 10
    store.close()


def test_a_store_whose_journal_cannot_be_written_folds_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "u.sqlite"
    store = UsageStore(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: 0)  # a full disk
        with pytest.raises(OSError, match="No space left"):
            store.append([row(10)])
    assert tokens(path) == 0
    store.fold()
    assert tokens(path) == 10
    store.close()


def test_a_long_journal_asks_to_be_folded(tmp_path: Path) -> None:
    store = UsageStore(tmp_path / "u.sqlite")
    while not store.has_long_journal:
        store.append([row(1, model=f"{number}") for number in range(100)])
    assert (tmp_path / "u.sqlite.journal").stat().st_size < 2 * MAX_JOURNAL_SIZE
    store.fold()
    assert not store.has_long_journal
    store.checkpoint()
    store.close()


def test_a_damaged_file_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "u.sqlite"
    path.write_bytes(b"no database" * 1000)
    store = UsageStore(path)
    store.append([row(10)])
    store.close()
    assert tokens(path) == 10
    assert (tmp_path / "u.sqlite.damaged").read_bytes().startswith(b"no database")
    assert "is damaged" in caplog.text


def test_a_place_that_cannot_be_used_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert open_store(tmp_path / "file" / "u.sqlite") is None
    (tmp_path / "target").write_text("")
    (tmp_path / "link.sqlite").symlink_to(tmp_path / "target")
    assert open_store(tmp_path / "link.sqlite") is None
    assert caplog.text.count("usage is not kept") == 2


def test_a_reader_does_not_hold_up_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "u.sqlite"
    store = UsageStore(path)
    store.append([row(10)])
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT COUNT(*) FROM usage").fetchone() == (0,)
    assert store.fold()
    reader.close()
    store.close()
