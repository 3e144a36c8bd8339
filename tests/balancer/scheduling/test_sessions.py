"""Conversations that their clients name: each policy keeps them on one node."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from gpumesh.balancer.base import Demand
from gpumesh.balancer.prefixes import PromptPrint
from gpumesh.balancer.scheduling.scheduler import Scheduler
from gpumesh.topology import PolicyKind
from tests.balancer.scheduling.fleets import KEY_A, NOW, A, ask, ask_long, make_node, make_scheduler

PROMPT = PromptPrint(tuple(range(1, 9)), 4000)
OTHER_PROMPT = PromptPrint(tuple(range(101, 109)), 4000)


def serve(scheduler: Scheduler, demand: Demand, now: float) -> str:
    """Serves a request within a second, and returns its node."""
    placement = scheduler.place_now(demand, now)
    assert placement is not None
    scheduler.note_first_token(placement.placed, now)
    scheduler.end(placement.placed, now + 1.0)
    return placement.placed.account.name


def test_a_conversation_stays_where_the_answer_to_its_short_first_prompt_was_written() -> None:
    """The answer is most of the second prompt, and is in the cache of the node that wrote it."""
    scheduler = make_scheduler()
    for name in "ab":
        make_node(scheduler, name, slots=4)
    first = serve(scheduler, ask_long(scheduler, 1000, residency=KEY_A, session=7), NOW)
    scheduler.place_now(ask(node=first, tokens=200), NOW + 10.0)  # the other node is idle
    second = Demand(A, max_tokens=20, residency=KEY_A, session=7, prompt=PROMPT, prompt_tokens=1000)
    assert serve(scheduler, second, NOW + 10.0) == first
    assert serve(scheduler, replace(second, session=8, prompt=OTHER_PROMPT), NOW + 10.0) != first


@pytest.mark.parametrize("policy", list(PolicyKind))
@pytest.mark.parametrize("prompt", [None, PROMPT])
def test_every_policy_keeps_a_named_conversation_on_its_node(policy: PolicyKind, prompt: PromptPrint | None) -> None:
    scheduler = make_scheduler(policy)
    for name in "abcdef":
        make_node(scheduler, name, slots=4)
    turn = Demand(A, max_tokens=20, residency=KEY_A, session=7, prompt=prompt)
    first = serve(scheduler, turn, NOW)
    for number in range(6):
        serve(scheduler, ask(), NOW + 10.0 * number + 5.0)  # so that the turn is not that of the same node
        assert serve(scheduler, turn, NOW + 10.0 * number + 10.0) == first
    others = [replace(turn, session=number, prompt=None) for number in range(100, 130)]
    assert len({serve(scheduler, other, NOW + 100.0) for other in others}) > 3, "other conversations go elsewhere"


@pytest.mark.parametrize("policy", [PolicyKind.ROUND_ROBIN, PolicyKind.LEAST_LOADED, PolicyKind.POWER_OF_TWO])
def test_a_conversation_whose_node_is_full_or_away_moves_and_stays_there(policy: PolicyKind) -> None:
    scheduler = make_scheduler(policy)
    for name in "abc":
        make_node(scheduler, name, slots=1)
    turn = Demand(A, max_tokens=20, residency=KEY_A, session=7)
    first = serve(scheduler, turn, NOW)
    blocking = scheduler.place_now(ask(node=first), NOW + 1.0)
    assert blocking is not None
    second = serve(scheduler, turn, NOW + 2.0)
    assert second != first
    scheduler.end(blocking.placed, NOW + 3.0)
    assert [serve(scheduler, turn, NOW + 4.0 + number) for number in range(3)] == [second] * 3
    scheduler.accounts[second].is_up = False
    scheduler.note_change(scheduler.accounts[second])
    assert serve(scheduler, turn, NOW + 10.0) != second
