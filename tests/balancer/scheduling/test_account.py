"""A node's account: its slots, its counts, and how long what runs there will take still."""

import math

import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import LEAST_REMAINING_SHARE, GpuGroup, NodeAccount, PlacedRequest
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.breaker import BreakerPhase
from gpumesh.balancer.outcomes import Blame
from gpumesh.balancer.work import Work
from tests.balancer.placed import make_placed
from tests.balancer.scheduling.fleets import KEY_A, NOW, A, B


def make_account(name: str = "n", *, slots: int | None = 2, learns: bool = False) -> NodeAccount:
    account = NodeAccount(name, max_parallel=slots)
    account.is_up = True
    account.learns_limit = learns
    return account


def place(
    account: NodeAccount, model: str | None = A, *, now: float = NOW, read_s: float = 1.0, write_s: float = 4.0
) -> PlacedRequest:
    demand = Demand(model, residency=None if model is None else ResidencyKey(model))
    placed = make_placed(account, demand, Work(100.0, 400.0), now=now, read_s=read_s, write_s=write_s)
    account.place(placed, now)
    return placed


# -- slots -------------------------------------------------------------------------------------------------------------


def test_the_number_of_slots_is_that_of_mesh_yaml_else_learned_else_told() -> None:
    account = make_account(slots=3, learns=True)
    account.reported_parallel = 8
    assert account.slots(A, NOW) == 3
    account.max_parallel = None
    assert account.slots(A, NOW) == 2, "one is proven, and one more may be tried"
    account.learns_limit = False
    assert account.slots(A, NOW) == 8
    account.reported_parallel = None
    assert account.slots(A, NOW) is None
    assert account.has_room(A, NOW)


def test_a_number_in_mesh_yaml_is_for_the_requests_to_all_models() -> None:
    account = make_account(slots=2)
    place(account, A)
    place(account, B)
    assert not account.has_room(A, NOW)
    assert not account.has_room(None, NOW)


def test_a_server_that_loads_models_has_slots_for_each() -> None:
    account = make_account(slots=None, learns=True)
    place(account, A)
    place(account, A)
    assert not account.has_room(A, NOW)
    assert account.has_room(B, NOW)


def test_more_slots_are_known_when_answers_run_together() -> None:
    account = make_account(slots=None, learns=True)
    first, second = place(account), place(account)
    account.note_first_token(first, NOW + 1.0)
    assert not account.has_room(A, NOW + 1.0)
    account.note_first_token(second, NOW + 1.5)
    assert account.slots(A, NOW + 1.5) == 4


def test_nodes_on_one_gpu_share_its_slots_and_streams() -> None:
    one, other = make_account("one"), make_account("other")
    one.group = other.group = GpuGroup("gpu", (one, other))
    placed = place(one)
    place(other, B)
    assert one.in_flight == other.in_flight == 1
    assert one.count() == other.count() == 2
    assert one.count(A) == other.count(A) == 1
    assert not one.has_room(A, NOW)
    assert not other.has_room(B, NOW)
    one.note_first_token(placed, NOW + 1.0)
    assert one.streams == other.streams == 1
    one.remove(placed, NOW + 2.0)
    assert other.has_room(B, NOW + 2.0)


def test_requests_of_other_gateways_take_slots() -> None:
    account = make_account(slots=2)
    account.group.others_in_flight = 2
    assert account.count() == 2
    assert account.in_flight == 0
    assert not account.has_room(A, NOW)


# -- counts ------------------------------------------------------------------------------------------------------------


def test_a_request_is_counted_from_its_placing_to_its_end() -> None:
    account = make_account(slots=4)
    first, second = place(account), place(account)
    assert account.placed_by_model == {A: 2}
    assert account.activity.reading == 2
    account.note_first_token(first, NOW + 1.0)
    account.note_first_token(first, NOW + 2.0)
    assert first.first_token_at == NOW + 1.0, "a second call does nothing"
    assert (account.activity.reading, account.streams) == (1, 1)
    account.remove(first, NOW + 3.0)
    account.remove(first, NOW + 3.0)
    assert (account.activity.reading, account.streams, account.in_flight) == (1, 0, 1)
    account.remove(second, NOW + 4.0)
    assert (account.activity.reading, account.streams, account.in_flight) == (0, 0, 0)
    assert account.placed_by_model == {}
    account.note_first_token(second, NOW + 5.0)
    assert account.streams == 0, "it has ended before"


def test_a_request_without_a_model_is_counted_too() -> None:
    account = make_account(slots=1)
    placed = place(account, None)
    assert not account.has_room(None, NOW)
    account.remove(placed, NOW)
    assert account.has_room(None, NOW)


def test_an_answer_shows_that_its_model_is_in_memory() -> None:
    account = make_account()
    account.note_first_token(place(account), NOW + 1.0)
    assert account.residency.is_resident(KEY_A)


# -- how busy ----------------------------------------------------------------------------------------------------------


def test_prompts_are_read_one_after_another() -> None:
    account = make_account(slots=4)
    first, second = place(account, read_s=1.0), place(account, read_s=2.0)
    assert account.remaining_read_s(NOW) == 3.0
    assert account.remaining_read_s(NOW + 1.0) == 2.0
    assert account.remaining_read_s(NOW + 9.0) == 0.0
    account.note_first_token(first, NOW + 0.5)
    assert account.remaining_read_s(NOW + 0.5) == 2.5
    account.remove(second, NOW + 0.6)  # its client has gone before the first token
    assert account.remaining_read_s(NOW + 0.6) == 0.0


def test_a_prompt_is_read_when_its_model_is_loaded() -> None:
    account = make_account()
    placed = place(account, read_s=1.0)
    account.remove(placed, NOW)
    placed.ended = False
    account.place(placed, NOW, load_s=4.0)
    assert account.remaining_read_s(NOW) == 5.0


def test_the_rest_of_the_answers_is_a_mean_from_their_first_tokens_on() -> None:
    account = make_account(slots=4)
    assert account.mean_remaining_s(NOW) == 0.0
    account.note_first_token(place(account, write_s=4.0), NOW + 2.0)
    assert account.mean_remaining_s(NOW + 2.0) == 4.0
    account.note_first_token(place(account, write_s=8.0), NOW + 2.0)
    assert account.mean_remaining_s(NOW + 3.0) == 5.0
    assert account.mean_remaining_s(NOW + 60.0) == 0.0


def test_the_next_slot_is_free_when_the_first_of_the_requests_ends() -> None:
    account = make_account()
    assert account.next_free_s(NOW, A) == 0.0
    place(account, read_s=1.0, write_s=4.0)
    place(account, B, read_s=1.0, write_s=2.0)
    assert account.next_free_s(NOW, A) == 3.0
    assert account.drain_s(NOW, [A]) == 5.0
    assert account.drain_s(NOW, [A, B]) == 5.0
    assert account.drain_s(NOW, []) == 0.0


def test_the_next_slot_is_free_when_any_request_on_the_gpu_ends() -> None:
    one, other = make_account("one", slots=1), make_account("other", slots=1)
    one.group = other.group = GpuGroup("gpu", (one, other))
    place(one, read_s=1.0, write_s=4.0)
    assert not other.has_room(A, NOW)
    assert other.next_free_s(NOW, A) == 5.0


def test_the_end_of_another_models_request_frees_no_slot_of_this_one() -> None:
    account = make_account(slots=None, learns=True)
    account.learned_slots.restore({A: {"proven": 1, "search": "known"}}, now=NOW)
    place(account, A, write_s=9.0)
    place(account, B, write_s=1.0)
    assert not account.has_room(A, NOW)
    assert account.next_free_s(NOW, A) == 10.0


def test_a_request_that_runs_longer_than_expected_does_not_count_as_ending_now() -> None:
    account = make_account()
    place(account, read_s=1.0, write_s=4.0)
    assert account.next_free_s(NOW + 20.0, A) == pytest.approx(20.0 * LEAST_REMAINING_SHARE)


def test_while_slots_are_found_the_next_one_is_known_at_the_next_first_token() -> None:
    account = make_account(slots=None, learns=True)
    place(account, read_s=1.0, write_s=60.0)
    place(account, read_s=2.0, write_s=60.0)
    assert account.next_free_s(NOW, A) == 1.0
    for placed in list(account.placed):
        account.note_first_token(placed, NOW + 2.0)
    assert account.next_free_s(NOW + 2.0, A) == 60.0


def test_streams_are_meant_over_the_time_of_an_answer() -> None:
    account = make_account(slots=4)
    first, second = place(account), place(account)
    assert account.mean_streams(first, NOW) == 1.0, "it has not begun"
    account.note_first_token(first, NOW)
    account.note_first_token(second, NOW + 1.0)
    assert account.mean_streams(first, NOW + 4.0) == pytest.approx((1 + 2 * 3) / 4)
    account.remove(second, NOW + 4.0)
    assert account.mean_streams(first, NOW + 8.0) == pytest.approx((1 + 2 * 3 + 4) / 8)


# -- can it serve ------------------------------------------------------------------------------------------------------


def test_a_node_that_is_away_or_whose_breaker_is_open_is_not_usable() -> None:
    account = make_account()
    assert account.is_usable(NOW)
    account.is_up = False
    assert not account.is_usable(NOW)
    account.is_up = True
    account.breaker = account.breaker.trip(NOW)
    assert not account.is_usable(NOW)


def test_the_first_request_after_a_breakers_pause_is_its_trial() -> None:
    account = make_account(slots=4)
    account.breaker = account.breaker.trip(NOW)
    after = NOW + 60.0
    assert account.breaker.phase(after) is BreakerPhase.HALF_OPEN
    place(account, now=after)
    assert not account.is_usable(after)


def test_a_model_that_cannot_be_loaded_is_broken_for_itself_only() -> None:
    account = make_account()
    account.model_breakers.record_failure(A, Blame.MODEL_LOAD, "out of memory", NOW)
    assert account.is_broken_for(A, NOW)
    assert account.is_broken_for(A, NOW, despite_doubt=True)
    assert not account.is_broken_for(B, NOW)
    assert account.is_usable(NOW)


@pytest.mark.parametrize("told", [-1.0, 2.0, 1e10, math.inf, math.nan])
def test_a_utilisation_that_no_gpu_has_stays_within_bounds(told: float) -> None:
    account = make_account()
    account.foreign_load = told
    assert 0.0 <= account.foreign_load <= 1.0


def test_the_durations_of_an_answer_teach_the_slots() -> None:
    """Of two requests that were sent together, the second has waited inside the server for the first."""
    account = make_account(slots=None, learns=True)
    first = place(account)
    account.note_first_token(first, NOW + 1.0)
    second = place(account, now=NOW + 2.0)
    account.remove(first, NOW + 5.0, ServerCounters(tokens=40, total_ms=5000, prompt_ms=1000, eval_ms=4000))
    account.note_first_token(second, NOW + 6.0)
    waited = ServerCounters(tokens=40, total_ms=8000, prompt_ms=1000, eval_ms=4000)
    account.remove(second, NOW + 10.0, waited)
    assert account.slots(A, NOW + 10.0) == 1
