"""Properties of ``FairQueue`` under any order of additions, grants, discards and corrections."""

from __future__ import annotations

from collections import Counter, defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gpumesh.balancer.base import Priority
from gpumesh.balancer.fair_queue import FairQueue
from gpumesh.balancer.fairness.lane import GRANTS_BEFORE_SHARE, RANKS, QueueEntry

CLIENTS = st.sampled_from("abc")
GROUPS = st.sampled_from("xyz")
PRIORITIES = st.sampled_from(list(Priority))
COSTS = st.floats(0, 5000)
MAX_SIZE = 40


class AnyOrder(RuleBasedStateMachine):
    """The queue against a plain list of what waits."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[int] = FairQueue(MAX_SIZE)
        self.waiting: list[QueueEntry[int]] = []
        self.gone: set[int] = set()
        self.now = 0.0
        # For each lane and each higher class: slots that this or a higher class took from the lane, since its class
        # got a slot.
        self.skipped: Counter[tuple[Priority, str, Priority]] = Counter()

    @rule(priority=PRIORITIES, group=GROUPS, client=CLIENTS, tokens=COSTS, age=st.floats(0, 5), count=st.integers(1, 9))
    def add(self, priority: Priority, group: str, client: str, tokens: float, age: float, count: int) -> None:
        for _ in range(count):
            self.now += 1
            was_accepted_before = age > 4
            if not self.queue.has_room(priority) and not was_accepted_before:
                return
            queued_at = self.now - age
            entry = self.queue.add(
                len(self.waiting) + len(self.gone),
                priority,
                queued_at,
                group=group,
                client=client,
                work=tokens / 10,
                tokens=tokens,
                bounded=not was_accepted_before,
            )
            self.waiting.append(entry)

    @rule(groups=st.sets(GROUPS, min_size=1), count=st.integers(1, 20))
    def take(self, groups: set[str], count: int) -> None:
        for _ in range(count):
            entry = self.queue.best(groups)
            competing = [other for other in self.waiting if other.group in groups]
            if entry is None:
                assert not competing
                return
            assert entry in competing
            earlier = [e for e in competing if (e.priority, e.client) == (entry.priority, entry.client)]
            assert entry is min(earlier, key=lambda e: (e.queued_at, e.sequence)), "FIFO within a client"
            highest = min((other.priority for other in competing), key=RANKS.__getitem__)
            if entry.priority is not highest:
                owed = max(
                    count
                    for (lower, group, higher), count in self.skipped.items()
                    if lower is entry.priority and group in groups and higher is highest
                )
                assert owed >= GRANTS_BEFORE_SHARE, "a lower class goes first only for its share"
            self.queue.take(entry, groups)
            self._leave(entry)
            self._count_grant(entry, groups)

    def _count_grant(self, entry: QueueEntry[int], groups: set[str]) -> None:
        rank = RANKS[entry.priority]
        for lower, group in {(other.priority, other.group) for other in self.waiting}:
            assert isinstance(group, str)
            if group not in groups:
                continue
            for higher in Priority:
                if RANKS[lower] == rank:
                    self.skipped[lower, group, higher] = 0
                elif rank <= RANKS[higher] < RANKS[lower]:
                    self.skipped[lower, group, higher] += 1

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        if self.waiting:
            entry = data.draw(st.sampled_from(self.waiting))
            self.queue.discard(entry)
            self._leave(entry)
            self.queue.discard(entry)  # a second time changes nothing

    @rule(priority=PRIORITIES, client=CLIENTS, tokens=st.floats(-5000, 5000) | st.sampled_from([float("nan"), 1e300]))
    def charge(self, priority: Priority, client: str, tokens: float) -> None:
        self.queue.charge(priority, client, tokens)

    @rule(priority=PRIORITIES, client=CLIENTS, tokens=COSTS)
    def grant_unqueued(self, priority: Priority, client: str, tokens: float) -> None:
        self.queue.grant_unqueued(priority, client, tokens)

    def _leave(self, entry: QueueEntry[int]) -> None:
        assert entry.sequence not in self.gone, "served or discarded twice"
        self.gone.add(entry.sequence)
        self.waiting.remove(entry)
        lane_is_empty = not any((e.priority, e.group) == (entry.priority, entry.group) for e in self.waiting)
        if lane_is_empty:
            for higher in Priority:
                assert isinstance(entry.group, str)
                self.skipped.pop((entry.priority, entry.group, higher), None)

    @invariant()
    def counts_and_sums_are_equal(self) -> None:
        assert self.queue.size == len(self.queue) == len(self.waiting)
        assert all(entry in self.queue for entry in self.waiting)
        assert set(self.queue.groups()) == {entry.group for entry in self.waiting}
        by_group: dict[object, list[QueueEntry[int]]] = defaultdict(list)
        for entry in self.waiting:
            by_group[entry.group].append(entry)
        for group, entries in by_group.items():
            assert self.queue.size_of(group) == len(entries)
            for priority in Priority:
                before = sum(e.work for e in entries if RANKS[e.priority] <= RANKS[priority])
                assert abs(self.queue.work_before(group, priority) - before) < 1e-6
            heads = self.queue.heads(group)
            assert [head.priority for head in heads] == sorted({e.priority for e in entries}, key=RANKS.__getitem__)

    @invariant()
    def the_order_shown_has_each_entry_once_and_starts_with_the_best(self) -> None:
        order = list(self.queue)
        assert len(order) == len(self.waiting)
        assert set(order) == set(self.waiting)
        if order:
            assert order[0] is self.queue.best(self.queue.groups())


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40)  # each has 50 steps of up to 20 requests


def take_best(queue: FairQueue[str]) -> QueueEntry[str]:
    entry = queue.best(queue.groups())
    assert entry is not None
    queue.take(entry)
    return entry


@given(
    arrivals=st.lists(st.booleans(), max_size=120),
    group_of_batch=st.lists(st.sampled_from("gh"), min_size=1, max_size=3),
)
def test_an_interactive_request_gets_the_first_free_slot_while_few_were_granted_since_a_batch_request(
    arrivals: list[bool], group_of_batch: list[str]
) -> None:
    """Batch requests always wait, interactive ones come in any pattern, each step frees a slot."""
    queue: FairQueue[str] = FairQueue(10_000)
    for number in range(200):
        queue.add("b", Priority.BATCH, 0.0, group=group_of_batch[number % len(group_of_batch)], client="b", tokens=10.0)
    interactive_since_batch = 0
    for comes in arrivals:
        if comes:
            queue.add("i", Priority.INTERACTIVE, 1.0, group="g", client="i", tokens=10.0)
        waits = any(head.payload == "i" for head in queue.heads("g"))
        entry = take_best(queue)
        if waits and interactive_since_batch < GRANTS_BEFORE_SHARE:
            assert entry.payload == "i"
        interactive_since_batch = interactive_since_batch + 1 if entry.payload == "i" else 0
        assert interactive_since_batch <= GRANTS_BEFORE_SHARE


@given(
    counts=st.fixed_dictionaries({priority: st.integers(1, 90) for priority in Priority}),
    lone_at=st.integers(0, 60),
)
def test_each_class_that_waits_gets_its_share_and_a_lone_interactive_request_never_pays_for_others(
    counts: dict[Priority, int], lone_at: int
) -> None:
    queue: FairQueue[str] = FairQueue(10_000)
    for priority in (Priority.NORMAL, Priority.BATCH):
        for _ in range(counts[priority]):
            queue.add(priority.value, priority, 0.0, group="g", client="c", tokens=1.0)
    waited_for_batch = 0
    for step in range(sum(counts.values())):
        if step == lone_at:
            queue.add("lone", Priority.INTERACTIVE, 9.0, group="g", client="c", tokens=1.0)
        if not queue:
            break
        batch_waits = any(head.priority is Priority.BATCH for head in queue.heads("g"))
        entry = take_best(queue)
        if step == lone_at:
            assert entry.payload == "lone"
        waited_for_batch = 0 if entry.priority is Priority.BATCH or not batch_waits else waited_for_batch + 1
        assert waited_for_batch <= GRANTS_BEFORE_SHARE + 1


@given(
    costs=st.dictionaries(
        st.sampled_from("abcde"),
        st.lists(st.tuples(st.floats(1, 4000), st.floats(1, 4000)), min_size=1, max_size=5),
        min_size=2,
    ),
    slots=st.integers(1, 4),
    steps=st.integers(0, 150),
)
def test_the_work_served_to_two_backlogged_clients_differs_by_a_bounded_amount(
    costs: dict[str, list[tuple[float, float]]], slots: int, steps: int
) -> None:
    """The bound of VTC (theorem 4.4 of the paper): twice the greatest cost; and for each slot once more, because its
    request is charged what is expected until it ends."""
    queue: FairQueue[tuple[str, float]] = FairQueue(100_000)
    for client, requests in costs.items():
        for number in range(200):
            expected, true = requests[number % len(requests)]
            queue.add((client, true), Priority.NORMAL, 0.0, group="g", client=client, tokens=expected)
    served = dict.fromkeys(costs, 0.0)
    running: list[QueueEntry[tuple[str, float]]] = []
    for _ in range(steps):
        entry = queue.best(["g"])
        assert entry is not None
        queue.take(entry, ["g"])
        running.append(entry)
        if len(running) >= slots:
            ended = running.pop(0)
            client, true = ended.payload
            queue.charge(Priority.NORMAL, client, true - ended.tokens)
            served[client] += true
    greatest = max(cost for requests in costs.values() for pair in requests for cost in pair)
    assert max(served.values()) - min(served.values()) <= (2 + slots) * greatest + 1e-6
