from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from gpumesh.notify.events import MeshEvent
from gpumesh.notify.outbox import MAX_MESSAGES, MAX_PENDING, Outbox, PendingEvent
from gpumesh.topology import EventKind

QUIET_S = 300.0


def event(node: str | None, kind: EventKind = EventKind.NODE_DOWN) -> MeshEvent:
    return MeshEvent(kind, node, f"{node} {kind}")


def told(due: Sequence[PendingEvent]) -> list[tuple[str, int]]:
    return [(pending.event.message, pending.count) for pending in due]


def test_the_first_event_is_due_at_once_and_then_the_node_is_quiet() -> None:
    outbox = Outbox(QUIET_S)
    assert outbox.next_due_s(0.0) is None
    outbox.add(event("a"))
    assert outbox.next_due_s(0.0) == 0.0
    assert told(outbox.take_due(0.0)) == [("a node-down", 1)]
    for kind in (EventKind.NODE_UP, EventKind.NODE_DOWN, EventKind.NODE_UP):
        outbox.add(event("a", kind))
    assert outbox.take_due(10.0) == ()
    assert outbox.next_due_s(10.0) == QUIET_S - 10.0
    assert told(outbox.take_due(QUIET_S)) == [("a node-up", 3)]
    assert outbox.next_due_s(QUIET_S) is None


def test_other_nodes_and_other_subjects_are_not_quiet() -> None:
    outbox = Outbox(QUIET_S)
    outbox.add(event("a"))
    outbox.take_due(0.0)
    outbox.add(event("b"))
    outbox.add(event("a", EventKind.THRASHING))
    assert told(outbox.take_due(1.0)) == [("b node-down", 1), ("a thrashing", 1)]


def test_events_past_the_most_messages_are_sent_together() -> None:
    outbox = Outbox(QUIET_S)
    sent = 0
    for number in range(50):
        outbox.add(event(f"n{number}"))
        sent += bool(outbox.take_due(float(number)))
    assert sent == MAX_MESSAGES
    wait_s = outbox.next_due_s(50.0)
    assert wait_s == QUIET_S - 50.0
    assert len(outbox.take_due(50.0 + wait_s)) == 50 - MAX_MESSAGES


def test_a_flood_takes_no_memory_without_bound() -> None:
    outbox = Outbox(QUIET_S)
    for number in range(MAX_PENDING + 10):
        outbox.add(event(f"n{number}"))
    assert len(outbox.take_due(0.0)) == MAX_PENDING


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(list(EventKind)), st.integers(0, 120)), max_size=120))
def test_never_more_than_it_can_say_and_the_last_state_is_always_told(steps: list[tuple[int, EventKind, int]]) -> None:
    outbox, now = Outbox(QUIET_S), 0.0
    last: dict[tuple[str | None, bool], str] = {}
    heard: dict[tuple[str | None, bool], str] = {}
    sent_at: list[float] = []

    def take() -> None:
        due = outbox.take_due(now)
        if due:
            sent_at.append(now)
        for pending in due:
            is_health = pending.event.kind in (EventKind.NODE_DOWN, EventKind.NODE_UP, EventKind.ALL_DOWN)
            if is_health:
                heard[pending.event.node, is_health] = pending.event.message

    for node, kind, pause in steps:
        one = event(f"n{node}", kind)
        outbox.add(one)
        if kind in (EventKind.NODE_DOWN, EventKind.NODE_UP, EventKind.ALL_DOWN):
            last[one.node, True] = one.message
        take()
        now += pause
    while (wait_s := outbox.next_due_s(now)) is not None:
        now += wait_s
        take()
    assert heard == last
    for begin in sent_at:
        assert sum(begin <= at < begin + QUIET_S for at in sent_at) <= MAX_MESSAGES
