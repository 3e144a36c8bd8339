"""Whatever happens, no request is lost or granted twice, and each gets a slot when its patience is over at the latest.

Hypothesis lets requests come, begin, end and fail, nodes go and come back, reports arrive and time pass, in any order.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import GpuGroup, NodeAccount, PlacedRequest
from gpumesh.balancer.base import Demand, Priority, ResidencyKey
from gpumesh.balancer.fairness.lane import QueueEntry
from gpumesh.balancer.prefixes import PromptPrint
from gpumesh.balancer.scheduling import shortlist
from gpumesh.balancer.scheduling.scheduler import Placement, Scheduler
from gpumesh.balancer.scheduling.waiting import Group, Waiting, could_serve
from gpumesh.topology import PolicyKind
from tests.balancer.scheduling.fleets import NOW, A, B, C, make_node, make_scheduler

MAX_QUEUE = 8
NODES = ("a", "b", "c", "d")
MOST_CHECKS = 20_000  # in a row without any other event: a pinned model may be spared for an hour, and a check is due
# each half second while the node that is awaited should have a free slot already

prompts = st.none() | st.builds(
    lambda chat, blocks: PromptPrint(tuple(hash((chat, number)) for number in range(blocks)), 500 * blocks),
    st.integers(0, 3),
    st.integers(1, 30),
)
demands = st.builds(
    lambda model, context, **given: Demand(
        model, residency=None if model is None else ResidencyKey(model, context), **given
    ),
    model=st.sampled_from([A, A, B, C, None]),
    context=st.sampled_from([None, None, 8192]),
    priority=st.sampled_from(list(Priority)),
    client=st.sampled_from(["", "x", "y"]),
    max_tokens=st.none() | st.integers(0, 3000),
    prompt_tokens=st.none() | st.integers(0, 20_000),
    prompt=prompts,
    session=st.none() | st.integers(0, 2),
    node=st.sampled_from([None, None, None, "a"]),
    nodes=st.sampled_from([None, None, frozenset("ab")]),
    preferred_nodes=st.sampled_from([frozenset(), frozenset("d")]),
)


class AnyEvents(RuleBasedStateMachine):
    kind = PolicyKind.ADAPTIVE

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.scheduler: Scheduler = make_scheduler(self.kind, max_queue=MAX_QUEUE)
        self.waiting: dict[int, QueueEntry[Waiting]] = {}
        self.running: dict[int, PlacedRequest] = {}
        self.gone: set[int] = set()
        self.count = 0

    @initialize(
        slots=st.lists(st.sampled_from([1, 1, 2, 4, None]), min_size=4, max_size=4),
        tiers=st.lists(st.integers(1, 2), min_size=4, max_size=4),
        speeds=st.lists(st.sampled_from([0.05, 1.0, 1.0, 3.0]), min_size=4, max_size=4),
        count=st.integers(1, 4),
        are_grouped=st.booleans(),
        learns=st.booleans(),
        pins=st.booleans(),
    )
    def make_fleet(
        self,
        slots: list[int | None],
        tiers: list[int],
        speeds: list[float],
        count: int,
        are_grouped: bool,
        learns: bool,
        pins: bool,
    ) -> None:
        self.scheduler = make_scheduler(self.kind, max_queue=MAX_QUEUE, pinned=[B] if pins else [])
        for number, name in enumerate(NODES[:count]):
            node = make_node(
                self.scheduler,
                name,
                slots=slots[number],
                loaded=[(A,), (B,), (), (A, B)][number],
                models=None if number == 3 else (A, B, C),
                tier=tiers[number],
                speed=speeds[number],
                single=number != 3,
            )
            node.learns_limit = learns
        if are_grouped and count > 1:
            pair = [self.scheduler.accounts[name] for name in "ab"]
            pair[0].group = pair[1].group = GpuGroup("gpu", pair)

    # -- events ------------------------------------------------------------------------------------------------------

    @rule(demand=demands, excluded=st.sampled_from([frozenset(), frozenset(), frozenset("a")]), times=st.integers(1, 4))
    def submit(self, demand: Demand, excluded: frozenset[str], times: int) -> None:
        for _ in range(times):
            number, self.count = self.count, self.count + 1
            self.grant()
            placement = self.scheduler.place_now(demand, self.now, exclude=excluded)
            if placement is not None:
                self.take(number, placement, demand)
                continue
            was_full = not self.scheduler.queue.has_room(demand.priority)
            try:
                entry = self.scheduler.wait(demand, self.now, number, exclude=excluded)
            except OverflowError:
                assert was_full
                self.gone.add(number)
            else:
                assert not was_full
                self.waiting[number] = entry
            self.grant()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        placed = self.pick(data)
        self.scheduler.note_first_token(placed, self.now)
        self.end_trial(placed.account)
        self.grant()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=st.none() | st.integers(0, 5000), load_s=st.floats(0, 20), is_whole=st.booleans())
    def end(self, data: st.DataObject, tokens: int | None, load_s: float, is_whole: bool) -> None:
        placed = self.pick(data)
        seconds = self.now - placed.sent_at
        counters = ServerCounters(
            prompt_tokens=100,
            tokens=tokens,
            total_ms=seconds * 1000.0,
            load_ms=min(load_s, seconds) * 1000.0,
            prompt_ms=10.0,
            eval_ms=seconds * 500.0,
        )
        self.scheduler.end(placed, self.now, counters if is_whole else None)
        if not is_whole:
            self.scheduler.note_failed(placed)
        self.leave(placed)
        self.grant()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail_and_move(self, data: st.DataObject) -> None:
        """A node fails a request, which then keeps its place in the queue."""
        placed = self.pick(data)
        number = next(number for number, other in self.running.items() if other is placed)
        self.scheduler.end(placed, self.now)
        self.scheduler.note_failed(placed)
        self.end_trial(placed.account)
        del self.running[number]
        excluded = frozenset({placed.account.name})
        self.grant()
        placement = self.scheduler.place_now(placed.demand, self.now, exclude=excluded)
        if placement is not None:
            self.take(number, placement, placed.demand)
        else:
            self.waiting[number] = self.scheduler.wait(
                placed.demand, self.now, number, exclude=excluded, accepted_at=placed.sent_at
            )
        self.grant()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """The client of a waiting request goes."""
        number = data.draw(st.sampled_from(sorted(self.waiting)))
        self.scheduler.queue.discard(self.waiting.pop(number))
        self.gone.add(number)

    @rule(name=st.sampled_from(NODES), is_up=st.booleans())
    def change_node(self, name: str, is_up: bool) -> None:
        account = self.scheduler.accounts.get(name)
        if account is None:
            return
        account.is_up = is_up
        if not is_up:
            for placed in list(account.placed):
                self.scheduler.end(placed, self.now)
                self.leave(placed)
        self.scheduler.note_report(account)
        self.grant()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ends_pause=st.booleans())
    def break_node(self, data: st.DataObject, ends_pause: bool) -> None:
        """A request fails, and its node's breaker opens; or a request succeeds, and it closes."""
        placed = self.pick(data)
        account = placed.account
        self.scheduler.end(placed, self.now)
        self.leave(placed)
        account.breaker = account.breaker.record_success() if ends_pause else account.breaker.trip(self.now)
        self.scheduler.note_change(account)
        self.grant()

    @rule(
        name=st.sampled_from(NODES),
        loaded=st.dictionaries(
            st.sampled_from([A, B, C]), st.tuples(st.none() | st.integers(0, 3000), st.sampled_from([None, 4096, 8192]))
        ),
        age_s=st.floats(0, 5),
    )
    def report(self, name: str, loaded: dict[str, tuple[int | None, int | None]], age_s: float) -> None:
        account = self.scheduler.accounts.get(name)
        if account is None:
            return
        for model in account.residency.replace_with_report(loaded, asked_at=self.now - age_s):
            self.scheduler.note_unloaded(account, model)
        self.scheduler.note_report(account)
        self.grant()

    @rule(seconds=st.floats(0, 30))
    def pass_time(self, seconds: float) -> None:
        """Time passes, and the owner looks when it was told to."""
        until = self.now + seconds
        while True:
            check_at = self.scheduler.next_check()
            if check_at is None or check_at > until:
                break
            self.now = max(check_at, self.now)
            self.grant()
        self.now = until

    @rule()
    def wait_until_all_patience_is_over(self) -> None:
        """Nothing happens any more. Whoever waits then waits because no node has a free slot for it."""
        began_at = self.now
        for _ in range(MOST_CHECKS):
            check_at = self.scheduler.next_check()
            if check_at is None:
                break
            self.now = max(check_at, self.now)
            self.grant()
        else:
            raise AssertionError(f"a request waits for ever, {self.now - began_at:.1f} s already")
        for entry in self.waiting.values():
            group = entry.group
            assert isinstance(group, Group)
            assert not self.nodes_with_room(group), f"{entry.payload} waits although a slot is free"

    # -- what they do ------------------------------------------------------------------------------------------------

    def grant(self) -> None:
        for entry, placement in self.scheduler.grants(self.now):
            number: Any = entry.payload.payload
            assert self.waiting.pop(number) is entry, "granted twice, or after it had gone"
            assert entry not in self.scheduler.queue
            self.take(number, placement, entry.payload.demand, entry.payload.exclude)
        assert self.scheduler.grants(self.now) == [], "a second call grants nothing"

    def take(self, number: int, placement: Placement, demand: Demand, excluded: frozenset[str] = frozenset()) -> None:
        assert number not in self.running
        placed = placement.placed
        self.running[number] = placed
        account = placed.account
        assert account.is_up
        assert account.name not in excluded
        assert demand.node in (None, account.name)
        assert demand.nodes is None or account.name in demand.nodes
        assert placement.forecast.node == account.name
        assert 0.0 <= placement.forecast.total_s < math.inf
        if account.max_parallel is not None:
            assert account.in_flight <= account.max_parallel, "more than the node has slots"

    def pick(self, data: st.DataObject) -> PlacedRequest:
        return self.running[data.draw(st.sampled_from(sorted(self.running)))]

    def leave(self, placed: PlacedRequest) -> None:
        number = next(number for number, other in self.running.items() if other is placed)
        del self.running[number]
        self.gone.add(number)
        self.end_trial(placed.account)

    def end_trial(self, account: NodeAccount) -> None:
        """A half-open breaker lets the next request through."""
        if account.breaker.trial_in_flight:
            account.breaker = account.breaker.cancel_trial()
            self.scheduler.note_change(account)

    def nodes_with_room(self, group: Group) -> list[NodeAccount]:
        model = None if group.residency is None else group.residency.model
        return [
            account
            for account in self.scheduler.accounts.values()
            if account.is_usable(self.now)
            and could_serve(account, group, self.now)
            and account.has_room(model, self.now)
        ]

    # -- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def no_request_is_lost(self) -> None:
        assert set(self.waiting) | set(self.running) | self.gone == set(range(self.count))
        assert len(self.waiting) + len(self.running) + len(self.gone) == self.count
        assert self.scheduler.queue.size == len(self.waiting)
        assert all(entry in self.scheduler.queue for entry in self.waiting.values())

    @invariant()
    def counts_are_those_of_the_placed_requests(self) -> None:
        for account in self.scheduler.accounts.values():
            here = [placed for placed in self.running.values() if placed.account is account]
            assert account.placed == set(here)
            assert account.in_flight == len(here)
            models = [placed.model or "" for placed in here]
            assert account.placed_by_model == {model: models.count(model) for model in models}
            begun = [placed for placed in here if placed.first_token_at is not None]
            assert account.activity.streams == len(begun)
            assert account.activity.reading == len(here) - len(begun)
            assert account._decode_ends_sum == pytest.approx(sum(placed.ends_at for placed in begun), abs=1e-3)
            if account.learns_limit and account.max_parallel is None:
                for model in {A, B, C}:
                    assert account.learned_slots.in_flight(model) == models.count(model)

    @invariant()
    def copies_are_those_in_memory(self) -> None:
        for model in (A, B, C):
            having = {account.name for account in self.scheduler.accounts.values() if model in account.residency.loaded}
            assert having == set(self.scheduler._fleet.copies._holders.get(model, ()))

    def describe(self) -> str:
        lines = [f"{self.now}: {self.scheduler}"]
        for account in self.scheduler.accounts.values():
            lines.append(
                f"{account} of {account.max_parallel} slots, loaded {account.residency.loaded}, {account.breaker}"
            )
        lines += [f"{group}: {self.nodes_with_room(group)}" for group in self.scheduler.groups()]
        return "\n".join([*lines, *(str(entry.payload) for entry in self.waiting.values())])

    @invariant()
    def somebody_will_look_again(self) -> None:
        """Who waits although a slot is free for it is asked again at a known time."""
        if any(self.nodes_with_room(group) for group in self.scheduler.groups()):
            assert self.scheduler.next_check() is not None, self.describe()


class AnyEventsShortlist(AnyEvents):
    """The same with the shortlist of large fleets. It does not rank the nodes that cannot load a model now, so nobody
    knows when they can."""

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(shortlist, "MAX_RANKED_WHOLE", 0)

    def teardown(self) -> None:
        self._patch.undo()

    def nodes_with_room(self, group: Group) -> list[NodeAccount]:
        key = group.residency
        return [node for node in super().nodes_with_room(group) if key is None or node.residency.is_resident(key)]


class AnyEventsLeastLoaded(AnyEvents):
    kind = PolicyKind.LEAST_LOADED


class AnyEventsPowerOfTwo(AnyEvents):
    kind = PolicyKind.POWER_OF_TWO


TestAnyEvents = AnyEvents.TestCase
TestAnyEvents.settings = settings(max_examples=40, stateful_step_count=30)
TestAnyEventsShortlist = AnyEventsShortlist.TestCase
TestAnyEventsShortlist.settings = settings(max_examples=40, stateful_step_count=30)
TestAnyEventsLeastLoaded = AnyEventsLeastLoaded.TestCase
TestAnyEventsLeastLoaded.settings = settings(max_examples=15, stateful_step_count=30)
TestAnyEventsPowerOfTwo = AnyEventsPowerOfTwo.TestCase
TestAnyEventsPowerOfTwo.settings = settings(max_examples=15, stateful_step_count=30)
