"""The ledger by itself: leases, breaker, learned figures and counts, without a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.base import Demand
from gpumesh.balancer.breaker import Breaker
from gpumesh.balancer.outcomes import Blame, ErrorReply, Outcome
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.mesh.nodes.ledger import Ledger
from gpumesh.topology import BackendKind
from tests.mesh.nodes.build import NodeEvents, make_node, make_scheduler, make_spec, place

MODEL = "qwen2.5:7b"
DEMAND = Demand(model=MODEL)
COPY = Demand(model=None, needs_slot=False)
LOADED = ServerCounters(tokens=100, total_ms=1600.0, load_ms=500.0, prompt_ms=100.0, eval_ms=1000.0)
COUNTERS = ServerCounters(tokens=100, total_ms=1110.0, load_ms=10.0, prompt_ms=100.0, eval_ms=1000.0)


class LedgerDesk:
    """The ledger of a node with an Ollama, and what it has announced."""

    def __init__(self, kind: BackendKind = BackendKind.OLLAMA, **backend: Any) -> None:
        self.events = NodeEvents()
        self.scheduler = make_scheduler()
        spec = make_spec("http://127.0.0.1:9", kind=kind, **backend)
        self.node = make_node(spec, self.events, scheduler=self.scheduler)
        self.changes = 0
        self.failures: list[tuple[Outcome, str | None]] = []
        self.loaded: list[str] = []
        self.ledger = Ledger(
            self.node.account,
            self.scheduler,
            clock=self.events.clock,
            on_slot_freed=self.events.on_slot_freed,
            on_change=self.count_change,
            on_failure=lambda outcome, error: self.failures.append((outcome, error)),
            on_model_loaded=self.loaded.append,
        )

    def count_change(self) -> None:
        self.changes += 1

    def lease(self, demand: Demand = DEMAND) -> Lease:
        placement = place(self.node.account, demand, self.events.now) if demand.needs_slot else None
        return self.ledger.lease(self.node, demand, placement)

    def fail(self, times: int, outcome: Outcome = Outcome.SERVER_ERROR, demand: Demand = DEMAND) -> None:
        for _ in range(times):
            self.lease(demand).release(outcome, error="it failed")

    def is_open(self) -> bool:
        """Whether the breaker keeps requests away."""
        return not self.ledger.breaker.allows(self.events.now)

    def counts(self) -> tuple[int, int, int, int]:
        ledger = self.ledger
        return ledger.in_flight, ledger.served, ledger.failed, ledger.cancelled


@pytest.fixture
async def desk() -> LedgerDesk:
    return LedgerDesk()


async def test_a_lease_is_counted_once_however_often_it_is_released(desk: LedgerDesk) -> None:
    lease = desk.lease()
    assert desk.counts() == (1, 0, 0, 0)
    freed = desk.events.slots_freed
    lease.release(Outcome.SERVED)
    lease.release(Outcome.CUT)
    lease.discard()
    assert lease.released
    assert desk.counts() == (0, 1, 0, 0)
    assert desk.events.slots_freed == freed + 1


async def test_each_outcome_has_its_own_count_and_an_unused_lease_none(desk: LedgerDesk) -> None:
    for outcome in (Outcome.SERVED, Outcome.CLIENT_GONE, Outcome.SERVER_ERROR, Outcome.CLIENT_ERROR):
        desk.lease().release(outcome)
    desk.lease().discard()
    desk.lease(COPY).release(Outcome.SERVED)
    assert desk.counts() == (0, 1, 1, 1)
    assert sum(desk.ledger.attempt_outcomes.values()) == 4, "what costs no inference is not in the figures"


async def test_the_account_counts_what_runs_at_the_same_time(desk: LedgerDesk) -> None:
    first, second, store = desk.lease(), desk.lease(), desk.lease(COPY)
    account = desk.node.account
    assert (account.in_flight, account.count(MODEL), account.count("other")) == (2, 2, 0)
    assert account.learned_slots.in_flight(MODEL) == 2
    assert desk.ledger.in_flight == 2, "what costs no inference takes no slot"
    first.release(Outcome.SERVED)
    second.discard()
    assert (account.in_flight, account.learned_slots.in_flight(MODEL)) == (0, 0)
    store.release(Outcome.SERVED)


async def test_failures_in_a_row_open_the_breaker_and_success_closes_it(desk: LedgerDesk) -> None:
    desk.fail(3)
    assert desk.is_open()
    assert desk.failures == [(Outcome.SERVER_ERROR, "it failed")] * 3
    desk.events.now += 5.0
    assert not desk.is_open()
    trial = desk.lease()
    assert desk.is_open(), "one trial at a time"
    trial.release(Outcome.SERVED)
    assert desk.ledger.breaker == Breaker()


async def test_a_500_to_a_store_request_does_not_open_the_breaker(desk: LedgerDesk) -> None:
    desk.fail(5, demand=COPY)
    assert not desk.is_open()
    assert not desk.failures
    desk.fail(3, Outcome.UNREACHABLE, COPY)
    assert desk.is_open(), "that it cannot be reached is true of all requests"


async def test_a_trial_whose_answer_has_begun_lets_others_try(desk: LedgerDesk) -> None:
    desk.fail(3)
    desk.events.now += 5.0
    trial = desk.lease()
    freed = desk.events.slots_freed
    trial.mark_answer_started()
    assert not desk.is_open()
    assert desk.events.slots_freed > freed, "the queue is looked through again"
    trial.release(Outcome.CUT, error="it broke off")
    assert desk.is_open(), "the trial has failed after all"


async def test_a_model_that_cannot_be_loaded_leaves_the_nodes_breaker_alone(desk: LedgerDesk) -> None:
    reply = ErrorReply(500, "model requires more system memory (7.5 GiB) than is available (5.2 GiB)")
    lease = desk.lease()
    lease.release(Outcome.SERVER_ERROR, error="it answered 500", reply=reply)
    assert lease.blame is Blame.MODEL_LOAD
    assert desk.ledger.breaker == Breaker()
    assert desk.ledger.model_breakers.broken(desk.events.now) == {MODEL}
    assert (desk.counts(), desk.failures) == ((0, 0, 1, 0), [(Outcome.SERVER_ERROR, "it answered 500")])
    desk.events.now += 5.0
    trial = desk.lease()
    assert desk.ledger.model_breakers.broken(desk.events.now) == {MODEL}, "one trial at a time"
    desk.lease(Demand(model=MODEL, needs_slot=False)).release(Outcome.SERVED)
    assert desk.ledger.model_breakers.broken(desk.events.now) == {MODEL}, "that request was no trial"
    freed = desk.events.slots_freed
    trial.mark_answer_started()
    assert not desk.ledger.model_breakers.broken(desk.events.now)
    assert desk.events.slots_freed > freed, "the queue is looked through again"
    trial.discard()
    desk.lease().release(Outcome.SERVED)
    assert desk.ledger.model_breakers.open_faults == ()


async def test_three_models_that_cannot_be_loaded_open_the_nodes_breaker(desk: LedgerDesk) -> None:
    for model in ("x", "y", "z"):
        assert not desk.is_open()
        desk.lease(Demand(model=model)).release(Outcome.SERVER_ERROR, reply=ErrorReply(500, "out of memory"))
    assert desk.is_open()
    desk.ledger.reset_breakers()
    assert not desk.is_open()
    assert desk.ledger.model_breakers.open_faults == ()


async def test_a_client_that_leaves_is_no_failure(desk: LedgerDesk) -> None:
    desk.fail(10, Outcome.CLIENT_GONE)
    assert not desk.is_open()
    assert not desk.failures


async def test_a_forgiven_failure_closes_the_breaker(desk: LedgerDesk) -> None:
    desk.fail(2)
    lease = desk.lease()
    lease.release(Outcome.SERVER_ERROR)
    assert desk.is_open()
    desk.ledger.forgive_failure(lease)
    assert not desk.is_open()


async def test_rates_and_load_times_are_learned_from_the_servers_counters(desk: LedgerDesk) -> None:
    leases = [desk.lease(), desk.lease()]
    desk.events.now += 1.6  # as long as the server says
    for lease in leases:
        lease.release(Outcome.SERVED, counters=LOADED)
    rates = desk.node.account.rates
    assert rates.decode_s(MODEL, 100.0, 1) == pytest.approx(1.0)
    assert rates.load_s(MODEL) == pytest.approx(0.5)
    assert desk.node.account.learned_slots.limit(MODEL).proven == 1, "both waited for the load, perhaps one by one"
    assert desk.loaded == [MODEL] * 2


async def test_the_limit_is_learned_from_the_servers_counters(desk: LedgerDesk) -> None:
    leases = [desk.lease(), desk.lease()]
    desk.events.now += 1.11  # as long as the server says
    for lease in leases:
        lease.release(Outcome.SERVED, counters=COUNTERS)
    slots = desk.node.account.learned_slots
    assert slots.limit(MODEL).proven == 2, "two ran together, and neither waited inside the server"
    assert desk.node.account.slots(MODEL, desk.events.now) == 4, "twice as many are tried"


async def test_the_limit_is_learned_at_the_first_tokens(desk: LedgerDesk) -> None:
    leases = [desk.lease(), desk.lease()]
    assert desk.node.account.slots(MODEL, desk.events.now) == 1, "more are tried only after a sign"
    for lease in leases:
        lease.mark_answer_started()
    assert desk.node.account.slots(MODEL, desk.events.now) == 4, "both answers run, so there are two slots"
    for lease in leases:
        lease.release(Outcome.CLIENT_GONE)


@pytest.mark.parametrize(
    ("backend", "slots"), [({"max_parallel": 4}, 4), ({"kind": BackendKind.OPENAI}, None)], ids=["given", "told"]
)
async def test_no_limit_is_learned_where_it_is_given_or_told(backend: dict[str, Any], slots: int | None) -> None:
    desk = LedgerDesk(**backend)
    for lease in [desk.lease(), desk.lease()]:
        lease.release(Outcome.SERVED, counters=COUNTERS)
    assert desk.node.account.learned_slots.limit(MODEL).proven == 1
    assert desk.node.account.slots(MODEL, desk.events.now) == slots


async def test_only_a_whole_answer_is_learned_from(desk: LedgerDesk) -> None:
    for outcome in (Outcome.CUT, Outcome.CLIENT_GONE):
        desk.lease().release(outcome, counters=COUNTERS)
    rates = desk.node.account.rates
    assert rates.decode_s(MODEL, 100.0, 1) != pytest.approx(1.0)
    assert not desk.loaded


@pytest.mark.parametrize(
    "change",
    [
        lambda desk, lease: lease.release(Outcome.SERVED),
        lambda desk, lease: lease.discard(),
        lambda desk, lease: lease.mark_answer_started(),
    ],
    ids=["served", "discarded", "begun"],
)
@pytest.mark.parametrize("demand", [DEMAND, COPY], ids=["with slot", "without slot"])
async def test_the_end_of_a_trial_gives_the_node_to_the_requests_that_wait(
    desk: LedgerDesk, demand: Demand, change: Callable[[LedgerDesk, Lease], None]
) -> None:
    account, now = desk.node.account, desk.events.now + 5.0
    desk.fail(3)
    desk.events.now = now
    trial = desk.lease(demand)
    account.is_up, account.models = True, None
    desk.scheduler.wait(DEMAND, now, None)
    assert desk.scheduler.grants(now) == []
    change(desk, trial)
    ((_, placement),) = desk.scheduler.grants(now)
    assert placement.placed.account is account


async def test_a_forgiven_failure_gives_the_node_to_the_requests_that_wait(desk: LedgerDesk) -> None:
    account, now = desk.node.account, desk.events.now
    desk.fail(2)
    lease = desk.lease()
    lease.release(Outcome.SERVER_ERROR)
    account.is_up, account.models = True, None
    desk.scheduler.wait(DEMAND, now, None)
    assert desk.scheduler.grants(now) == []
    desk.ledger.forgive_failure(lease)
    assert len(desk.scheduler.grants(now)) == 1


async def test_only_attempts_that_another_node_could_serve_are_moved(desk: LedgerDesk) -> None:
    movable, lonely, started = desk.lease(), desk.lease(), desk.lease()
    movable.can_move = lambda: True
    lonely.can_move = lambda: False
    started.can_move = lambda: True
    started.mark_answer_started()
    desk.ledger.abort_movable_attempts()
    assert [lease.aborted for lease in (movable, lonely, started)] == [True, False, False]
    desk.ledger.abort_all_attempts()
    assert lonely.aborted
    assert started.aborted


async def test_a_released_lease_holds_nothing_of_its_request(desk: LedgerDesk) -> None:
    lease = desk.lease()
    lease.can_move = lambda: True
    lease.set_abort_callback(lambda: None)
    lease.release(Outcome.SERVED)
    lease.set_abort_callback(lambda: None)
    assert [lease.can_move, lease.abort_callback] == [None, None]


async def test_repr_tells_the_state(desk: LedgerDesk) -> None:
    lease = desk.lease()
    desk.fail(3)
    assert repr(desk.ledger) == "<Ledger 1 in flight, 0 served, 3 failed, 0 cancelled, breaker open>"
    lease.abort_attempt()
    assert repr(lease) == "<Lease one aborted model qwen2.5:7b connection 0>"
