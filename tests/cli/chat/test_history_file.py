from __future__ import annotations

import stat
from pathlib import Path

from gpumesh.cli.chat import history_file


def test_entries_come_back_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    assert history_file.read_entries(path) == []
    for text in ("one", "two\nlines \u2028 ü", "\x1b[31m"):
        history_file.add_entry(path, text)
    assert history_file.read_entries(path) == ["one", "two\nlines \u2028 ü", "\x1b[31m"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_is_no_entry_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.write_bytes(b'"a"\n{}\nrubbish\n\xff\n"b"\n' + b"[" * 100_000 + b'\n"c')
    assert history_file.read_entries(path) == ["a", "b"]
    assert history_file.read_entries(tmp_path) == [], "a folder"
    history_file.add_entry(tmp_path, "x")


def test_the_file_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.write_text('"old"\n' * 10 + f'"{"x" * 10_000}"\n' * 150)
    entries = history_file.read_entries(path)
    assert 50 < len(entries) <= 110
    assert path.stat().st_size < history_file.MAX_FILE_BYTES
    assert history_file.read_entries(path)[-1] == "x" * 10_000
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("".join(f'"{number}"\n' for number in range(5000)))
    assert history_file.read_entries(path)[-1] == "4999"
    assert len(path.read_text().splitlines()) == history_file.MAX_ENTRIES
    size = path.stat().st_size
    history_file.add_entry(path, "x" * 100_000)
    assert path.stat().st_size == size, "a text that was pasted is not kept"
