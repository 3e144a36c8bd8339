from __future__ import annotations

import json
import logging
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.daemon import event_log
from gpumesh.daemon.event_log import compare_states
from gpumesh.state import BackendPhase, Finding, Health, MeshState, NodeState, Severity, TunnelPhase, TunnelState
from tests.cli.states import down, healthy, mesh


def told(*states: MeshState) -> list[str]:
    """What is told of these states, one after the other."""
    said = []
    last: MeshState | None = None
    for state in states:
        said += [f"{event.node}: {event.message}" for event in compare_states(last, state)]
        last = state
    return said


def tunnelled(phase: TunnelPhase, error: str | None = None) -> MeshState:
    node = down("a")
    return mesh(replace(node, health=Health.DOWN, tunnel=TunnelState("sshtunnel", phase, last_error=error)))


def test_what_is_there_at_the_start_is_told_once() -> None:
    state = mesh(healthy("a"))
    expected = ["a: tunnel up", "a: ollama up: http://127.0.0.1:40123", "a: unknown -> healthy"]
    assert told(state) == expected
    assert told(state, state, state) == expected


def test_every_change_has_its_reason() -> None:
    assert told(mesh(healthy("a")), mesh(down("a")))[3:] == [
        "a: tunnel backoff: nothing listens on 203.0.113.7:22",
        "a: ollama unknown",
        "a: healthy -> down: nothing listens on 203.0.113.7:22",
    ]
    ill = replace(healthy("a"), health=Health.DEGRADED, reason="40 % of m runs on the CPU")
    assert told(mesh(healthy("a")), mesh(ill))[3:] == ["a: healthy -> degraded: 40 % of m runs on the CPU"]


def test_a_server_that_is_down() -> None:
    node = healthy("a")
    broken = replace(node, backend=replace(node.backend, state=BackendPhase.DOWN, last_error="it refuses"))
    assert told(mesh(node), mesh(broken))[3:] == ["a: ollama down: it refuses"]


def test_a_host_that_is_away_is_told_once_and_again_when_the_reason_is_another() -> None:
    tries = [
        tunnelled(TunnelPhase.IDLE),
        tunnelled(TunnelPhase.CONNECTING),
        tunnelled(TunnelPhase.BACKOFF, "refused"),
        tunnelled(TunnelPhase.CONNECTING, "refused"),
        tunnelled(TunnelPhase.BACKOFF, "refused"),
        tunnelled(TunnelPhase.CONNECTING, "refused"),
        tunnelled(TunnelPhase.BACKOFF, "no route"),
        tunnelled(TunnelPhase.CONNECTING, "no route"),
        tunnelled(TunnelPhase.FAILED, "the key was refused"),
        tunnelled(TunnelPhase.CONNECTING, "the key was refused"),
        tunnelled(TunnelPhase.UP, "the key was refused"),
        tunnelled(TunnelPhase.CONNECTING, "reset"),
    ]
    assert [line for line in told(*tries) if "tunnel" in line] == [
        "a: tunnel connecting",
        "a: tunnel backoff: refused",
        "a: tunnel backoff: no route",
        "a: tunnel failed: the key was refused",
        "a: tunnel up",
        "a: tunnel connecting: reset",
    ]


def test_findings_are_told_when_they_are_new() -> None:
    found = Finding("same-gpu", Severity.WARNING, None, "one GPU behind a and b")
    state = mesh(healthy("a"), findings=(found,))
    assert told(mesh(healthy("a")), state, state)[3:] == ["None: one GPU behind a and b"]
    assert told(state, mesh(healthy("a")), state)[4:] == ["None: one GPU behind a and b"]


def test_a_node_that_is_new() -> None:
    assert told(mesh(healthy("a")), mesh(healthy("a"), healthy("b")))[3:][0] == "b: tunnel up"


@pytest.mark.parametrize(
    ("node", "level"),
    [(healthy("a"), logging.INFO), (down("a"), logging.WARNING)],
)
def test_levels(node: NodeState, level: int) -> None:
    assert max(event.level for event in compare_states(None, mesh(node))) == level


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "state" / "log.jsonl"
    handler = event_log.start_log(file)
    yield file
    event_log.stop_log(handler)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_json_and_private(path: Path) -> None:
    event_log.log_event(event_log.LogEvent(logging.WARNING, "health down", "a", "it said\n\x1b[31mno \ud800"))
    logging.getLogger("gpumesh.x").info("something %d", 5, extra={"event": "start"})
    first, second = lines(path)
    assert (first["level"], first["event"], first["node"]) == ("warning", "health down", "a")
    assert "\x1b" not in path.read_text()
    assert str(first["at"]).endswith("Z")
    assert (second["event"], second["node"], second["message"]) == ("start", None, "something 5")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_trace_is_one_line_too(path: Path) -> None:
    try:
        raise ValueError("inside")
    except ValueError:
        logging.getLogger("gpumesh.x").exception("failed")
    (line,) = lines(path)
    assert "ValueError: inside" in str(line["trace"])


def test_it_is_rotated_and_stays_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "ROTATE_BYTES", 2000)
    handler = event_log.start_log(tmp_path / "logs" / "log.jsonl")
    try:
        for number in range(200):
            logging.getLogger("gpumesh.x").info("line %d", number)
    finally:
        event_log.stop_log(handler)
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["log.jsonl", "log.jsonl.1", "log.jsonl.2", "log.jsonl.3"]
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)


def test_after_the_end_nothing_is_written(path: Path) -> None:
    handler = next(each for each in logging.getLogger("gpumesh").handlers if isinstance(each, logging.FileHandler))
    event_log.stop_log(handler)
    logging.getLogger("gpumesh.x").error("late")
    assert path.read_text() == ""
