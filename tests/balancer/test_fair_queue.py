from itertools import islice

import pytest

from gpumesh.balancer.base import Priority
from gpumesh.balancer.fair_queue import FairQueue
from gpumesh.balancer.fairness.client_counters import MAX_LAG, weighted_tokens
from gpumesh.balancer.fairness.lane import GRANTS_BEFORE_SHARE

INTERACTIVE, NORMAL, BATCH = Priority


def serve(queue: FairQueue[str], count: int = 1000) -> list[str]:
    """The next ``count`` requests get slots that suit all groups."""
    served: list[str] = []
    while len(served) < count and (entry := queue.best(queue.groups())) is not None:
        queue.take(entry)
        served.append(entry.payload)
    return served


def fill(queue: FairQueue[str], payload: str, count: int, priority: Priority, client: str = "") -> None:
    for number in range(count):
        queue.add(payload, priority, float(number), group="g", client=client or payload, tokens=1000)


# -- classes and shares ---------------------------------------------------------------------------------------------


def test_a_higher_class_goes_first_however_old_the_lower_ones_are() -> None:
    queue: FairQueue[str] = FairQueue(10)
    queue.add("batch", BATCH, 0.0, group="g")
    queue.add("normal", NORMAL, 1000.0, group="g")
    queue.add("interactive", INTERACTIVE, 2000.0, group="g")
    assert serve(queue) == ["interactive", "normal", "batch"]


def test_each_lower_class_gets_one_slot_after_so_many_of_higher_ones() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    fill(queue, "b", 5, BATCH)
    fill(queue, "n", 5, NORMAL)
    fill(queue, "i", 100, INTERACTIVE)
    part = GRANTS_BEFORE_SHARE * ["i"] + ["n", "b"]
    assert serve(queue, 36) == part + part


def test_a_share_that_was_earned_against_normal_requests_is_no_debt_of_interactive_ones() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    fill(queue, "b", 5, BATCH)
    fill(queue, "n", 50, NORMAL)
    assert serve(queue, GRANTS_BEFORE_SHARE) == GRANTS_BEFORE_SHARE * ["n"]
    queue.add("i", INTERACTIVE, 99.0, group="g")
    assert serve(queue, 3) == ["i", "b", "n"]


def test_slots_that_a_lower_class_could_not_use_count_nothing() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    fill(queue, "i", 50, INTERACTIVE)
    queue.add("b", BATCH, 0.0, group="on another node")
    for _ in range(2 * GRANTS_BEFORE_SHARE):
        entry = queue.best(["g"])
        assert entry is not None
        queue.take(entry, among=["g"])
    assert serve(queue, 1) == ["i"]


def test_a_share_goes_to_the_client_of_the_class_that_is_next_whatever_its_group() -> None:
    """Only the requests of group g were skipped; the slot suits both groups, and the older request is in the other."""
    queue: FairQueue[str] = FairQueue(1000)
    fill(queue, "i", 50, INTERACTIVE)
    queue.add("older", BATCH, 0.0, group="other", client="b")
    queue.add("younger", BATCH, 1.0, group="g", client="b")
    for _ in range(GRANTS_BEFORE_SHARE):
        entry = queue.best(["g"])
        assert entry is not None
        queue.take(entry, among=["g"])
    assert serve(queue, 2) == ["older", "i"]


# -- clients --------------------------------------------------------------------------------------------------------


def test_a_second_client_gets_the_next_slot_behind_many_requests_of_a_first_one() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    fill(queue, "first", 200, NORMAL)
    serve(queue, 50)
    queue.add("second", NORMAL, 99.0, group="g", client="second", tokens=1000)
    queue.add("second", NORMAL, 99.0, group="g", client="second", tokens=1000)
    assert serve(queue, 4) == ["second", "first", "second", "first"]


def test_a_client_that_was_served_without_waiting_is_not_shut_out_by_a_new_one() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    for _ in range(1000):
        queue.grant_unqueued(NORMAL, "old", 1000.0)
    fill(queue, "new", 50, NORMAL)
    fill(queue, "old", 50, NORMAL)
    assert serve(queue, 6).count("old") >= 2


def test_a_client_that_was_away_saves_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    queue.add("guest", NORMAL, 0.0, group="g", client="guest", tokens=1000)
    serve(queue)
    fill(queue, "steady", 200, NORMAL)
    serve(queue, 100)
    fill(queue, "guest", 50, NORMAL)
    assert serve(queue, 10).count("guest") <= 6


def test_what_a_class_was_served_counts_in_this_class_only() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    for _ in range(100):
        queue.grant_unqueued(BATCH, "a", 10_000.0)
    queue.add("a", INTERACTIVE, 0.0, group="g", client="a", tokens=1000)
    queue.add("b", INTERACTIVE, 1.0, group="g", client="b", tokens=1000)
    assert serve(queue) == ["a", "b"]


def test_a_correction_moves_a_waiting_client() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    fill(queue, "a", 3, NORMAL)
    fill(queue, "b", 4, NORMAL)
    assert serve(queue, 2) == ["a", "b"]
    queue.charge(NORMAL, "a", 500.0)
    assert serve(queue, 1) == ["b"]
    queue.charge(NORMAL, "b", -5000.0)
    assert serve(queue, 2) == ["b", "b"]


def test_a_client_behind_by_much_keeps_the_slots_only_for_a_bounded_time() -> None:
    """A waited long for a busy model; then its requests come to the model that B uses."""
    queue: FairQueue[str] = FairQueue(1000)
    queue.add("A waits", NORMAL, 0.0, group="busy", client="A", tokens=1000)
    for number in range(500):
        queue.add("B", NORMAL, float(number), group="g", client="B", tokens=1000)
    for _ in range(400):
        entry = queue.best(["g"])
        assert entry is not None
        queue.take(entry, among=["g"])
    for number in range(400):
        queue.add("A", NORMAL, 400.0 + number, group="g", client="A", tokens=1000)
    served = []
    while "B" not in served:
        entry = queue.best(["g"])
        assert entry is not None
        queue.take(entry, among=["g"])
        served.append(entry.payload)
    assert len(served) <= MAX_LAG / 1000 + 3


def test_a_request_that_a_node_failed_keeps_its_place_within_its_client_even_if_the_queue_is_full() -> None:
    queue: FairQueue[str] = FairQueue(2)
    queue.add("later", INTERACTIVE, 10.0, group="g", client="a")
    queue.add("latest", INTERACTIVE, 11.0, group="g", client="a")
    with pytest.raises(OverflowError):
        queue.add("refused", INTERACTIVE, 5.0, group="g", client="a")
    queue.add("failed", INTERACTIVE, 5.0, group="other", client="a", bounded=False)
    assert serve(queue) == ["failed", "later", "latest"]


def test_weighted_tokens_count_an_answer_twice() -> None:
    assert weighted_tokens(100, 10) == 120


# -- room -----------------------------------------------------------------------------------------------------------


def test_each_class_leaves_room_for_the_higher_ones() -> None:
    queue: FairQueue[str] = FairQueue(100)
    counts = []
    for priority in (BATCH, NORMAL, INTERACTIVE):
        while queue.has_room(priority):
            queue.add("x", priority, 0.0, group="g")
        with pytest.raises(OverflowError):
            queue.add("x", priority, 0.0, group="g")
        counts.append(len(queue))
    assert counts == [70, 90, 100]


@pytest.mark.parametrize(("max_size", "batch"), [(0, 0), (1, 1), (2, 1), (10, 7)])
def test_room_in_small_queues(max_size: int, batch: int) -> None:
    queue: FairQueue[str] = FairQueue(max_size)
    while queue.has_room(BATCH):
        queue.add("x", BATCH, 0.0, group="g")
    assert len(queue) == batch


# -- groups, work, order --------------------------------------------------------------------------------------------


def test_the_best_entry_is_chosen_among_the_given_groups() -> None:
    queue: FairQueue[str] = FairQueue(100)
    first = queue.add("first", NORMAL, 0.0, group="a", client="1")
    second = queue.add("second", NORMAL, 1.0, group="b", client="2")
    batch = queue.add("batch", BATCH, 0.0, group="b", client="2")
    assert queue.best(["a", "b", "unknown"]) is first
    assert queue.best(["b"]) is second
    assert queue.best([]) is None
    assert queue.heads("b") == [second, batch]
    assert set(queue.groups()) == {"a", "b"}
    assert (queue.size, queue.size_of("a"), queue.size_of("b"), queue.size_of("unknown")) == (3, 1, 2, 0)
    queue.discard(first)
    queue.discard(first)
    assert set(queue.groups()) == {"b"}
    assert first not in queue
    with pytest.raises(KeyError):
        queue.take(first)


def test_an_iteration_from_the_next_entry_yields_those_of_its_client_and_then_those_of_the_others() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for number in range(3):
        queue.add(f"a {number}", NORMAL, float(number), group="g", client="a")
        queue.add(f"b {number}", NORMAL, float(number), group="g", client="b")
    queue.add("other class", INTERACTIVE, 0.0, group="g")
    queue.add("other group", NORMAL, 0.0, group="h")
    queue.charge(NORMAL, "a", 1000.0)
    head = queue.add("b first", NORMAL, -1.0, group="g", client="b")
    payloads = [entry.payload for entry in queue.iterate_from(head)]
    assert payloads == ["b first", "b 0", "b 1", "b 2", "a 0", "a 1", "a 2"]


def test_work_is_summed_by_group_and_class() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for priority, work in ((INTERACTIVE, 1.0), (NORMAL, 2.0), (BATCH, 4.0), (BATCH, float("nan")), (NORMAL, -5.0)):
        queue.add("x", priority, 0.0, group="g", work=work)
    assert [queue.work_before("g", priority) for priority in Priority] == [1.0, 3.0, 7.0]
    assert queue.work_before("unknown", BATCH) == 0.0


def test_iteration_shows_the_order_of_service_and_changes_nothing() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    fill(queue, "b", 10, BATCH)
    fill(queue, "a", 20, NORMAL)
    fill(queue, "c", 20, NORMAL)
    shown = [entry.payload for entry in queue]
    last = list(queue)[-1]
    assert queue.position(last) == 49
    assert [entry.payload for entry in islice(queue, 5)] == shown[:5]
    assert serve(queue) == shown
    with pytest.raises(ValueError, match="not in the queue"):
        queue.position(last)
