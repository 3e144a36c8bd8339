"""A load that was sent counts as loaded at once. What follows from it: what the load pushes out, and its failure."""

from __future__ import annotations

from random import Random

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.prefixes.prints import PromptPrint, print_from_ids
from gpumesh.balancer.scheduling.scheduler import Placement, Scheduler
from gpumesh.topology import BackendKind, PolicyKind

KEY, OTHER = ResidencyKey("m:latest"), ResidencyKey("other:latest")
PROMPT = print_from_ids((1, 2, 3, 4), id_bytes=1024, size=4096)


def one_node(*loaded: str) -> tuple[Scheduler, NodeAccount]:
    """A node that has both models, these of them in memory. It is known to hold one model at a time."""
    scheduler = Scheduler(PolicyKind.ADAPTIVE, rng=Random(1), max_queue=10)
    account = scheduler.roster.add("a", max_parallel=4)
    account.kind, account.is_up, account.models = BackendKind.OLLAMA, True, {KEY.model, OTHER.model}
    account.residency.replace_with_report(dict.fromkeys(loaded, (None, None)), asked_at=0.0)
    scheduler.note_report(account)
    return scheduler, account


def place(scheduler: Scheduler, key: ResidencyKey, now: float, prompt: PromptPrint | None = None) -> Placement:
    demand = Demand(key.model, residency=key, prompt=prompt, prompt_tokens=None if prompt is None else 1024)
    placement = scheduler.place_now(demand, now)
    assert placement is not None
    return placement


def test_a_failed_load_counts_as_loaded_no_longer() -> None:
    scheduler, account = one_node()
    placed = place(scheduler, KEY, 1.0).placed
    assert account.residency.is_resident(KEY)
    scheduler.end(placed, 2.0)
    scheduler.note_failed(placed)
    assert not account.residency.is_resident(KEY)


def test_others_that_wait_for_the_load_show_that_it_may_go_on() -> None:
    scheduler, account = one_node()
    first, second = place(scheduler, KEY, 1.0).placed, place(scheduler, KEY, 1.5).placed
    scheduler.end(first, 2.0)
    scheduler.note_failed(first)
    assert account.residency.is_resident(KEY)
    scheduler.end(second, 2.5)
    scheduler.note_failed(second)
    assert not account.residency.is_resident(KEY)


def test_a_model_that_has_answered_stays_loaded_when_a_request_fails() -> None:
    scheduler, account = one_node(KEY.model)
    placed = place(scheduler, KEY, 1.0).placed
    scheduler.end(placed, 2.0)
    scheduler.note_failed(placed)
    assert account.residency.is_resident(KEY)


def test_the_prompts_of_a_model_that_is_pushed_out_are_forgotten() -> None:
    scheduler, _ = one_node(KEY.model)
    scheduler.end(place(scheduler, KEY, 1.0, PROMPT).placed, 2.0)
    demand = Demand(KEY.model, residency=KEY, prompt=PROMPT, prompt_tokens=1024)
    assert scheduler.experience.estimate(demand).cached["a"] > 0
    placement = place(scheduler, OTHER, 3.0)
    assert placement.forecast.pushed_out == [KEY.model]
    assert "a" not in scheduler.experience.estimate(demand).cached


def test_an_answer_without_any_figures_shows_that_the_model_is_loaded() -> None:
    """That of an embedding model, for example. Its time is not that of a request alone: nobody knows how long it
    loaded."""
    scheduler, account = one_node()
    scheduler.end(place(scheduler, KEY, 1.0).placed, 9.0, ServerCounters())
    assert account.residency.load_ends_at(KEY.model) is None
    second = place(scheduler, KEY, 10.0).placed
    assert not second.needs_load
    scheduler.end(second, 10.5, ServerCounters())
    assert account.residency.replace_with_report({}, asked_at=20.0) == [KEY.model], "unloaded since"
    third = place(scheduler, KEY, 30.0)
    assert third.forecast.load_s > 0
    assert scheduler._fleet.demands.service_s(KEY) == 0.5
