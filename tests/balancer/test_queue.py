import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.base import Priority
from gpumesh.balancer.queue import PRIORITY_DELAY_S, WaitQueue


def test_priorities_first_then_arrival() -> None:
    queue: WaitQueue[str] = WaitQueue(10)
    for name, priority in [("b1", Priority.BATCH), ("n1", Priority.NORMAL), ("i1", Priority.INTERACTIVE)]:
        queue.add(name, priority, 0.0)
    queue.add("n2", Priority.NORMAL, 0.0)
    assert [entry.payload for entry in queue] == ["i1", "n1", "n2", "b1"]


def test_a_request_that_waited_longer_than_its_head_start_is_served_before_newcomers() -> None:
    queue: WaitQueue[str] = WaitQueue(10)
    queue.add("old batch", Priority.BATCH, 0.0)
    queue.add("new", Priority.INTERACTIVE, PRIORITY_DELAY_S[Priority.BATCH] + 0.1)
    assert [entry.payload for entry in queue] == ["old batch", "new"]


def test_the_queue_is_bounded_and_has_room_again_after_a_discard() -> None:
    queue: WaitQueue[int] = WaitQueue(2)
    first = queue.add(1, Priority.NORMAL, 0.0)
    queue.add(2, Priority.NORMAL, 0.0)
    with pytest.raises(OverflowError):
        queue.add(3, Priority.INTERACTIVE, 0.0)
    queue.discard(first)
    queue.discard(first)
    queue.add(3, Priority.INTERACTIVE, 0.0)
    assert len(queue) == 2


@given(st.lists(st.tuples(st.sampled_from(list(Priority)), st.floats(0, 1000)), max_size=30))
def test_positions_are_the_order_of_service(items: list[tuple[Priority, float]]) -> None:
    queue: WaitQueue[int] = WaitQueue(100)
    for number, (priority, since) in enumerate(items):
        queue.add(number, priority, since)
    order = list(queue)
    assert [queue.position(entry) for entry in order] == list(range(len(items)))
