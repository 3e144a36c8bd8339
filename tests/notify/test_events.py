from __future__ import annotations

from dataclasses import replace

from gpumesh.notify.events import DOWN_FOR_S, UP_FOR_S, EventFinder
from gpumesh.state import Finding, Health, Severity
from gpumesh.topology import EventKind
from tests.cli.states import down, healthy, mesh


def kinds(finder: EventFinder, *states: tuple[float, object]) -> list[tuple[str, str | None]]:
    found = []
    for now, state in states:
        found += [(str(event.kind), event.node) for event in finder.find(state, now)]  # type: ignore[arg-type]
    return found


def test_a_node_is_told_as_down_after_a_time_and_as_back_only_then() -> None:
    both, one = mesh(healthy("a"), healthy("b")), mesh(down("a"), healthy("b"))
    finder = EventFinder()
    assert kinds(finder, (0.0, both), (1.0, one), (1.0 + DOWN_FOR_S - 0.1, one)) == []
    assert finder.next_change_s(1.0 + DOWN_FOR_S - 0.1) is not None
    assert kinds(finder, (1.0 + DOWN_FOR_S, one), (20.0, one)) == [("node-down", "a")]
    assert kinds(finder, (30.0, both), (30.0 + UP_FOR_S, both), (90.0, both)) == [("node-up", "a")]
    assert finder.next_change_s(90.0) is None


def test_a_node_that_is_away_for_a_moment_is_no_news() -> None:
    both, one = mesh(healthy("a"), healthy("b")), mesh(down("a"), healthy("b"))
    states = [(float(second), one if second % 10 else both) for second in range(200)]
    assert kinds(EventFinder(), *states) == []


def test_a_node_that_was_never_seen_up_is_told_too() -> None:
    unknown = mesh(replace(healthy("a"), health=Health.UNKNOWN), healthy("b"))
    away = mesh(down("a", reason="nothing listens there", hint="is the pod running?"), healthy("b"))
    finder = EventFinder()
    assert kinds(finder, (0.0, unknown), (60.0, unknown), (61.0, away)) == []
    (event,) = finder.find(away, 61.0 + DOWN_FOR_S)
    assert (event.message, event.hint) == ("a is down: nothing listens there", "is the pod running?")


def test_all_down_is_one_event_in_place_of_many() -> None:
    names = [f"n{number}" for number in range(6)]
    up, away = mesh(*map(healthy, names)), mesh(*(down(name, reason="no route") for name in names))
    finder = EventFinder()
    assert kinds(finder, (0.0, up), (1.0, away)) == []
    (event,) = finder.find(away, 1.0 + DOWN_FOR_S)
    assert (event.kind, event.node) == (EventKind.ALL_DOWN, None)
    assert event.message == (
        "no node of home can serve: n0: no route; n1: no route; n2: no route; n3: no route; and 2 more"
    )
    assert kinds(finder, (100.0, up), (100.0 + UP_FOR_S, up)) == [("node-up", name) for name in names]


def test_drained_and_removed_nodes_are_not_missed() -> None:
    up = mesh(healthy("a"), healthy("b"))
    drained = mesh(replace(down("a"), health=Health.DRAINING), healthy("b"))
    finder = EventFinder()
    assert kinds(finder, (0.0, up), (1.0, drained), (100.0, drained)) == []
    assert kinds(finder, (101.0, mesh(healthy("b"))), (200.0, mesh(healthy("b")))) == []


def test_findings_are_told_when_they_appear_and_again_after_they_were_gone() -> None:
    def finding(code: str) -> Finding:
        return Finding(code, Severity.WARNING, "a", f"{code} of a", "do something")

    plain = mesh(healthy("a"))
    missing = mesh(healthy("a"), findings=(finding("model-missing"), finding("gpu-count")))
    finder = EventFinder()
    assert kinds(finder, (0.0, missing), (1.0, missing)) == [("model-missing", "a")]
    assert kinds(finder, (2.0, plain), (3.0, missing)) == [("model-missing", "a")]
    full = mesh(healthy("a"), findings=(finding("disk-full"), finding("thrashing")))
    assert kinds(finder, (4.0, full)) == [("disk-full", "a"), ("thrashing", "a")]


def test_a_changed_host_key_is_told_at_once() -> None:
    node = down("a", reason="the host key has changed", hint="gpumesh trust a")
    node = replace(node, tunnel=replace(node.tunnel, error_code="host-key-changed"))
    (event,) = EventFinder().find(mesh(node, healthy("b")), 0.0)
    assert (event.kind, event.node, event.hint) == (EventKind.HOST_KEY_CHANGED, "a", "gpumesh trust a")
