"""Who gets the next slot: strict classes, fair clients, and the room in the queue."""

from __future__ import annotations

import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import PlacedRequest
from gpumesh.balancer.base import Demand, Priority
from gpumesh.balancer.fairness.lane import GRANTS_BEFORE_SHARE
from gpumesh.balancer.prefixes.cache_size import BYTES_PER_TOKEN
from gpumesh.balancer.scheduling.scheduler import Scheduler
from gpumesh.balancer.scheduling.waiting import could_serve, demand_of
from tests.balancer.scheduling.fleets import NOW, A, B, ask, make_node, make_scheduler

TOKENS = 100  # an answer takes 1 s on a node of ``make_node``


class Mesh:
    """A mesh of one model whose answers take exactly as long as they should. It sends what the scheduler grants."""

    def __init__(self, *, nodes: int = 1, slots: int = 1, max_queue: int = 10_000) -> None:
        self.scheduler: Scheduler = make_scheduler(max_queue=max_queue)
        for number in range(nodes):
            make_node(self.scheduler, f"n{number}", slots=slots)
        self.now = NOW
        self.running: list[tuple[float, str, PlacedRequest]] = []
        self.begun: list[tuple[str, float]] = []  # names and times, in the order of the grants

    def submit(self, name: str, demand: Demand) -> None:
        placement = self.scheduler.place_now(demand, self.now)
        if placement is None:
            self.scheduler.wait(demand, self.now, name)
            self.grant()
        else:
            self._begin(name, placement.placed)

    def grant(self) -> None:
        for entry, placement in self.scheduler.grants(self.now):
            assert isinstance(entry.payload.payload, str)
            self._begin(entry.payload.payload, placement.placed)

    def _begin(self, name: str, placed: PlacedRequest) -> None:
        self.begun.append((name, self.now))
        self.scheduler.note_first_token(placed, self.now)
        self.running.append((self.now + TOKENS * 0.01, name, placed))

    def step(self) -> None:
        """Lets the next answer end."""
        self.running.sort(key=lambda item: item[0])
        self.now, _, placed = self.running.pop(0)
        counters = ServerCounters(prompt_tokens=1, tokens=TOKENS, eval_ms=1000.0, total_ms=1000.0, prompt_ms=0.1)
        self.scheduler.end(placed, self.now, counters)
        self.grant()

    def began_at(self, name: str) -> float:
        return next(at for other, at in self.begun if other == name)


def work(client: str = "", priority: Priority = Priority.NORMAL, model: str = A) -> Demand:
    return ask(model, tokens=TOKENS, client=client, priority=priority)


def test_an_interactive_request_waits_for_the_end_of_one_answer_behind_any_batch() -> None:
    mesh = Mesh(nodes=2, slots=2)
    for number in range(500):
        mesh.submit(f"batch {number}", work("batch", Priority.BATCH))
    for _ in range(200):
        mesh.step()
    sent_at = mesh.now
    mesh.submit("chat", work("person", Priority.INTERACTIVE))
    while not any(name == "chat" for name, _ in mesh.begun):
        mesh.step()
    assert mesh.began_at("chat") - sent_at <= TOKENS * 0.01 * 1.05


def test_classes_are_strict_but_for_a_small_share() -> None:
    mesh = Mesh()
    mesh.submit("first", work())
    for number in range(40):
        mesh.submit(f"batch {number}", work("b", Priority.BATCH))
        mesh.submit(f"normal {number}", work("n", Priority.NORMAL))
        mesh.submit(f"interactive {number}", work("i", Priority.INTERACTIVE))
    for _ in range(40):
        mesh.step()
    classes = [name.split()[0] for name, _ in mesh.begun[1:]]
    assert classes[:GRANTS_BEFORE_SHARE] == ["interactive"] * GRANTS_BEFORE_SHARE
    assert classes.count("interactive") >= 40 - 2 * (40 // GRANTS_BEFORE_SHARE + 1)
    assert "batch" in classes
    assert "normal" in classes


def test_the_second_client_waits_for_no_more_than_one_answer() -> None:
    """Issue 13: a second client behind 200 requests of a first waits at most 3 s."""
    mesh = Mesh(nodes=2, slots=2)
    for number in range(200):
        mesh.submit(f"first {number}", work("first"))
    for _ in range(30):
        mesh.step()
    sent_at = mesh.now
    for number in range(5):
        mesh.submit(f"second {number}", work("second"))
    while not any(name == "second 4" for name, _ in mesh.begun):
        mesh.step()
    assert mesh.began_at("second 0") - sent_at <= 1.05
    assert mesh.began_at("second 4") - sent_at <= 3.0


def test_two_clients_that_both_have_much_work_share_the_slots() -> None:
    mesh = Mesh(slots=2)
    for number in range(60):
        mesh.submit(f"first {number}", work("first"))
    for number in range(60):
        mesh.submit(f"second {number}", work("second"))
    for _ in range(60):
        mesh.step()
    names = [name.split()[0] for name, _ in mesh.begun[2:]]
    assert abs(names.count("first") - names.count("second")) <= 3


def test_a_client_whose_answers_are_longer_than_expected_gets_fewer_slots() -> None:
    mesh = Mesh()
    mesh.submit("running", work("other"))
    for number in range(4):
        mesh.submit(f"long {number}", work("long"))
        mesh.submit(f"short {number}", work("short"))
    mesh.step()
    [(_, name, placed)] = mesh.running
    assert name == "long 0"
    mesh.running.clear()
    mesh.now += 5.0
    mesh.scheduler.end(placed, mesh.now, ServerCounters(prompt_tokens=10_000, tokens=500))
    mesh.grant()
    for _ in range(3):
        mesh.step()
    assert [name.split()[0] for name, _ in mesh.begun[2:]] == ["short"] * 4


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("lie", [0.05, 20.0])
def test_a_server_that_lies_in_its_counts_does_not_change_what_its_clients_are_charged(
    lie: float, learns: bool
) -> None:
    """The text of the answer has as many bytes as 100 tokens have."""

    def charge(factor: float) -> float:
        mesh = Mesh(nodes=3)
        for number in range(4):
            mesh.submit(str(number), work("one", Priority.BATCH))
        _, _, placed = mesh.running[0]
        placed.answer_bytes = round(TOKENS * BYTES_PER_TOKEN)
        before = mesh.scheduler.queue._counters[Priority.BATCH].of("one")
        if not learns:
            placed.account.learned_at = mesh.now + 1.0
        mesh.scheduler.end(placed, mesh.now + 1.0, ServerCounters(prompt_tokens=1, tokens=round(TOKENS * factor)))
        return mesh.scheduler.queue._counters[Priority.BATCH].of("one") - before

    assert charge(lie) == pytest.approx(charge(1.0), abs=1.0)


def test_within_a_client_the_first_goes_first() -> None:
    mesh = Mesh()
    for number in range(10):
        mesh.submit(str(number), work("one"))
    for _ in range(9):
        mesh.step()
    assert [name for name, _ in mesh.begun] == [str(number) for number in range(10)]


def test_a_full_queue_refuses_batch_first_and_interactive_last() -> None:
    mesh = Mesh(max_queue=10)
    scheduler = mesh.scheduler
    mesh.submit("running", work())
    for priority, room in ((Priority.BATCH, 7), (Priority.NORMAL, 9), (Priority.INTERACTIVE, 10)):
        while scheduler.queue.size < room:
            scheduler.wait(work(priority=priority), NOW, "x")
        with pytest.raises(OverflowError):
            scheduler.wait(work(priority=priority), NOW, "x")
    scheduler.wait(work(), NOW, "moved", accepted_at=NOW - 1.0)
    assert scheduler.queue.size == 11, "a request that was accepted is not refused"


def test_a_refused_request_leaves_nothing() -> None:
    mesh = Mesh(max_queue=0)
    mesh.submit("running", work())
    with pytest.raises(OverflowError):
        mesh.scheduler.wait(work(), NOW, "x")
    assert mesh.scheduler.queue.size == 0
    assert not mesh.scheduler.groups()
    assert mesh.scheduler.next_check() is None


def test_a_request_that_no_node_can_serve_keeps_nobody_behind_it_from_a_slot() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "a", models={A})
    away = make_node(scheduler, "b", models={B}, loaded=(B,))
    away.is_up = False
    placement = scheduler.place_now(work(), NOW)
    assert placement is not None
    scheduler.wait(work(priority=Priority.INTERACTIVE, model=B), NOW, "waits for b")
    scheduler.wait(work(), NOW, "waits for a")
    scheduler.end(placement.placed, NOW + 1.0)
    assert [entry.payload.payload for entry, _ in scheduler.grants(NOW + 1.0)] == ["waits for a"]
    away.is_up = True
    scheduler.note_report(away)
    assert [entry.payload.payload for entry, _ in scheduler.grants(NOW + 2.0)] == ["waits for b"]


def test_a_node_that_comes_back_takes_as_many_as_it_has_slots() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", slots=3)
    node.is_up = False
    for number in range(5):
        assert scheduler.place_now(work(), NOW) is None
        scheduler.wait(work(), NOW, number)
    assert scheduler.grants(NOW) == []
    node.is_up = True
    scheduler.note_report(node)
    assert [entry.payload.payload for entry, _ in scheduler.grants(NOW + 1.0)] == [0, 1, 2]
    assert scheduler.queue.size == 2


@pytest.mark.parametrize("waits_before", [True, False])
def test_a_node_whose_breakers_pause_is_over_is_asked_although_nothing_happens(waits_before: bool) -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "good")
    bad = make_node(scheduler, "bad")
    scheduler.place_now(ask(node="good"), NOW)
    failed = scheduler.place_now(ask(node="bad"), NOW)
    assert failed is not None
    if waits_before:
        scheduler.wait(work(), NOW, "waiting")
    scheduler.end(failed.placed, NOW + 1.0)
    bad.breaker = bad.breaker.trip(NOW + 1.0)
    scheduler.note_change(bad)
    assert scheduler.grants(NOW + 1.0) == []
    if not waits_before:
        assert scheduler.next_check() is None
        assert scheduler.place_now(work(), NOW + 1.1) is None
        scheduler.wait(work(), NOW + 1.1, "waiting")
        assert scheduler.grants(NOW + 1.1) == []
    check_at = scheduler.next_check()
    assert check_at == bad.breaker.open_until
    assert check_at is not None
    assert [placement.placed.account for _, placement in scheduler.grants(check_at)] == [bad]
    assert scheduler.next_check() is None


def test_groups_tell_what_can_serve_them() -> None:
    scheduler = make_scheduler()
    node = make_node(scheduler, "n", models={A})
    node.is_up = False
    for number in range(3):
        scheduler.wait(work(client=str(number)), NOW, number)
    other = scheduler.wait(work(), NOW, "moved", exclude=frozenset({"n"}))
    plain, moved = scheduler.groups()
    assert demand_of(plain) == Demand(A)
    assert could_serve(node, plain, NOW)
    assert not could_serve(node, moved, NOW)
    assert [entry.payload.payload for entry in scheduler.queue.entries_of(plain)] == [0, 1, 2]
    assert scheduler.queue.entries_of(moved) == [other]


def test_two_spellings_of_a_model_are_one_when_memory_is_compared() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "n", slots=2, models={"A", "a:latest"}, loaded=("a:latest",))
    for name in ("a", "a:latest"):
        placement = scheduler.place_now(work(model=name), NOW)
        assert placement is not None
        assert not placement.placed.needs_load
