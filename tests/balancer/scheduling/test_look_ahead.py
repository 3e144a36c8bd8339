"""A free slot goes to that one of the next waiting requests which loses least by it; nobody is passed over for ever."""

from __future__ import annotations

import pytest

from gpumesh.balancer.account import PlacedRequest
from gpumesh.balancer.base import Demand
from gpumesh.balancer.prefixes import PromptPrint
from gpumesh.balancer.scheduling.look_ahead import LOOKED_AT, PASSES_PER_NODE
from gpumesh.balancer.scheduling.scheduler import Scheduler
from gpumesh.topology import PolicyKind
from tests.balancer.scheduling.fleets import KEY_A, NOW, A, ask, make_node, make_scheduler


def prompt_of(name: str) -> PromptPrint:
    """About 2,560 of the 2,700 tokens of ``chat_with``."""
    return PromptPrint(tuple(hash((name, number)) for number in range(20)), 10_800)


def chat_with(name: str) -> Demand:
    return Demand(A, max_tokens=20, prompt_tokens=2700, residency=KEY_A, prompt=prompt_of(name))


class BusyFleet:
    """A fleet of nodes with one slot each, all of which are in use. ``cached`` says for each node whose prompts it has
    in its cache."""

    def __init__(self, cached: dict[str, str], policy: PolicyKind = PolicyKind.ADAPTIVE) -> None:
        self.scheduler: Scheduler = make_scheduler(policy)
        self.running: dict[str, PlacedRequest] = {}
        self.now = NOW
        for node, names in cached.items():
            make_node(self.scheduler, node)
            placement = self.scheduler.place_now(ask(tokens=2000, node=node), NOW)
            assert placement is not None
            self.scheduler.note_first_token(placement.placed, NOW)
            self.running[node] = placement.placed
            for name in names:
                self.scheduler.experience.prefixes.add(node, KEY_A, prompt_of(name), NOW)

    def wait(self, name: str) -> None:
        assert self.scheduler.place_now(chat_with(name), self.now) is None
        self.scheduler.wait(chat_with(name), self.now, name)

    def free(self, node: str) -> list[object]:
        """Ends what runs on the node. Returns who gets the slot."""
        self.now += 20.0
        self.scheduler.end(self.running[node], self.now)
        granted = self.scheduler.grants(self.now)
        for _, placement in granted:
            self.scheduler.note_first_token(placement.placed, self.now)
            self.running[placement.placed.account.name] = placement.placed
        return [entry.payload.payload for entry, _ in granted]


def test_a_slot_goes_to_the_request_that_has_its_prompt_there() -> None:
    fleet = BusyFleet({"a": "x", "b": "y"})
    for name in "xyz":
        fleet.wait(name)
    assert fleet.free("b") == ["y"]
    assert fleet.free("a") == ["x"]
    assert fleet.free("b") == ["z"]


def test_without_a_prompt_anywhere_the_first_goes_first() -> None:
    fleet = BusyFleet({"a": "", "b": ""})
    for name in "xyz":
        fleet.wait(name)
    assert fleet.free("b") + fleet.free("b") + fleet.free("a") == ["x", "y", "z"]


def test_only_the_next_requests_are_looked_at() -> None:
    fleet = BusyFleet({"a": "l", "b": "x"})
    for number in range(LOOKED_AT):
        fleet.wait(f"other {number}")
    fleet.wait("x")
    assert fleet.free("b") == ["other 0"]
    assert fleet.free("b") == ["x"]


@pytest.mark.parametrize("policy", [PolicyKind.LEAST_LOADED, PolicyKind.ROUND_ROBIN, PolicyKind.POWER_OF_TWO])
def test_policies_that_do_not_know_prompts_keep_the_order(policy: PolicyKind) -> None:
    fleet = BusyFleet({"a": "x", "b": "y"}, policy)
    for name in "xy":
        fleet.wait(name)
    assert fleet.free("b") == ["x"]


def test_a_request_is_passed_over_only_so_many_times() -> None:
    fleet = BusyFleet({"a": "x", "b": "y"})
    fleet.wait("x")
    passes = 0
    fleet.wait("y")
    while fleet.free("b") == ["y"]:
        passes += 1
        fleet.wait("y")
    assert passes == PASSES_PER_NODE * 2
