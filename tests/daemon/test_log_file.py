from __future__ import annotations

import json
import logging
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumesh.daemon import log_file
from gpumesh.daemon.state_changes import LogEvent


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "state" / "log.jsonl"
    handler = log_file.start_log(file)
    yield file
    log_file.stop_log(handler)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_json_and_private(path: Path) -> None:
    log_file.log_event(LogEvent(logging.WARNING, "health down", "a", "it said\n\x1b[31mno \ud800"))
    logging.getLogger("gpumesh.x").info("something %d", 5, extra={"event": "start"})
    first, second = lines(path)
    assert (first["level"], first["event"], first["node"]) == ("warning", "health down", "a")
    assert "\x1b" not in path.read_text()
    assert str(first["at"]).endswith("Z")
    assert (second["event"], second["node"], second["message"]) == ("start", None, "something 5")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_trace_is_in_the_same_line(path: Path) -> None:
    try:
        raise ValueError("inside")
    except ValueError:
        logging.getLogger("gpumesh.x").exception("failed")
    (line,) = lines(path)
    assert "ValueError: inside" in str(line["trace"])


def test_rotated_files_stay_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "ROTATE_BYTES", 2000)
    handler = log_file.start_log(tmp_path / "logs" / "log.jsonl")
    try:
        for number in range(200):
            logging.getLogger("gpumesh.x").info("line %d", number)
    finally:
        log_file.stop_log(handler)
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["log.jsonl", "log.jsonl.1", "log.jsonl.2", "log.jsonl.3"]
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)


def test_nothing_is_written_after_stop_log(path: Path) -> None:
    handler = next(
        handler for handler in logging.getLogger("gpumesh").handlers if isinstance(handler, logging.FileHandler)
    )
    log_file.stop_log(handler)
    logging.getLogger("gpumesh.x").error("late")
    assert path.read_text() == ""
