import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from gpumesh.balancer.account import GpuGroup, NodeAccount
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.policies import POLICIES
from gpumesh.balancer.policies.base import Choice, Question
from gpumesh.balancer.prefixes import PromptPrint
from gpumesh.balancer.scheduling.scheduler import Scheduler
from gpumesh.text.model_names import full_name
from gpumesh.topology import PolicyKind
from tests.balancer.scheduling.fleets import KEY_A, NOW, A, ask, ask_long, make_node, make_scheduler, set_speed

PROMPT = PromptPrint(tuple(range(1, 30)), 16_000)
TRIES_ONCE = [PolicyKind.ROUND_ROBIN, PolicyKind.LEAST_LOADED, PolicyKind.POWER_OF_TWO]


def choose(
    kind: PolicyKind,
    scheduler: Scheduler,
    demand: Demand | None = None,
    *,
    turn: int = 0,
    rng: random.Random | None = None,
    accounts: Sequence[NodeAccount] | None = None,
) -> Choice:
    """What the policy chooses among these nodes (all, if none are given). Changes nothing."""
    demand = ask() if demand is None else demand
    if demand.residency is None and demand.model is not None:
        demand = replace(demand, residency=ResidencyKey(full_name(demand.model)))
    work = scheduler.experience.estimate(demand)
    nodes = list(scheduler.accounts.values()) if accounts is None else accounts
    rng = random.Random(7) if rng is None else rng
    return POLICIES[kind].choose(Question(nodes, demand, work, scheduler._fleet, 0.0, NOW, turn, rng))


def chosen_node(choice: Choice) -> str | None:
    return None if choice.chosen is None else choice.chosen.node


def fill(scheduler: Scheduler, name: str, requests: int) -> None:
    """Places so many requests on the node, whose prompts are read and whose answers are just beginning."""
    account = scheduler.accounts[name]
    for _ in range(requests):
        limit, account.max_parallel = account.max_parallel, 1000
        placement = scheduler.place_now(ask(node=name), NOW)
        account.max_parallel = limit
        assert placement is not None
        scheduler.note_first_token(placement.placed, NOW)


# -- promises of every policy ------------------------------------------------------------------------------------------


nodes_given = st.lists(
    st.fixed_dictionaries(
        {
            "in_flight": st.integers(0, 5),
            "slots": st.none() | st.integers(1, 4),
            "rtt_s": st.floats(0, 1),
            "foreign_load": st.floats(0, 1),
            "speed": st.floats(0.01, 5.0),
            "is_loaded": st.booleans(),
            "tier": st.integers(1, 3),
        }
    ),
    max_size=6,
)


@pytest.mark.parametrize("kind", list(PolicyKind))
@given(nodes=nodes_given, turn=st.integers(0, 10**9))
def test_every_policy_chooses_a_node_with_a_free_slot_or_says_what_to_wait_for(
    kind: PolicyKind, nodes: list[dict[str, float]], turn: int
) -> None:
    scheduler = make_scheduler(kind)
    for number, given_node in enumerate(nodes):
        account = make_node(
            scheduler,
            f"n{number}",
            slots=given_node["slots"],  # type: ignore[arg-type]
            loaded=(A,) if given_node["is_loaded"] else (),
            tier=int(given_node["tier"]),
            speed=given_node["speed"],
        )
        account.rtt_s, account.foreign_load = given_node["rtt_s"], given_node["foreign_load"]
        fill(scheduler, f"n{number}", int(given_node["in_flight"]))
    free = {name for name, account in scheduler.accounts.items() if account.has_room(A, NOW)}
    choice = choose(kind, scheduler, turn=turn)
    if choice.chosen is not None:
        assert choice.chosen.node in free
        assert choice.chosen in choice.considered
    elif free:
        assert kind is PolicyKind.ADAPTIVE
        assert choice.patience_s is not None
        assert choice.patience_s >= 0.0
    if kind is PolicyKind.ADAPTIVE:
        compared = list(scheduler.accounts) if free else []
        assert [found.node for found in choice.considered] == compared, "each exactly once"


@pytest.mark.parametrize("kind", list(PolicyKind))
def test_equal_nodes_get_equal_shares(kind: PolicyKind) -> None:
    scheduler = make_scheduler(kind)
    for name in "abc":
        make_node(scheduler, name)
    rng = random.Random(1)
    shares = Counter(chosen_node(choose(kind, scheduler, turn=turn, rng=rng)) for turn in range(300))
    assert set(shares) == {"a", "b", "c"}
    assert all(70 <= count <= 130 for count in shares.values())


@pytest.mark.parametrize("kind", list(PolicyKind))
def test_the_scheduler_rotates_equal_nodes(kind: PolicyKind) -> None:
    scheduler = make_scheduler(kind)
    for name in "abc":
        make_node(scheduler, name, slots=4)
    shares: Counter[str] = Counter()
    for _ in range(300):
        placement = scheduler.place_now(ask(), NOW)
        assert placement is not None
        shares[placement.placed.account.name] += 1
        scheduler.end(placement.placed, NOW)
    assert all(70 <= shares[name] <= 130 for name in "abc"), shares


@pytest.mark.parametrize("kind", list(PolicyKind))
def test_a_lower_tier_is_used_when_the_upper_is_full(kind: PolicyKind) -> None:
    scheduler = make_scheduler(kind)
    make_node(scheduler, "own", tier=1)
    make_node(scheduler, "rented", tier=2, speed=1.5)
    assert {chosen_node(choose(kind, scheduler, turn=turn)) for turn in range(4)} == {"own"}
    # 20 s are to be written there: too long to wait for 1 s of work
    account = scheduler.accounts["own"]
    placement = scheduler.place_now(ask_long(scheduler, 2000, node="own"), NOW)
    assert placement is not None
    assert not account.has_room(A, NOW)
    assert {chosen_node(choose(kind, scheduler, turn=turn)) for turn in range(4)} == {"rented"}


@pytest.mark.parametrize("kind", list(PolicyKind))
def test_a_preferred_node_comes_before_all_tiers(kind: PolicyKind) -> None:
    scheduler = make_scheduler(kind)
    make_node(scheduler, "upper", tier=1)
    make_node(scheduler, "preferred", tier=9)
    demand = ask(preferred_nodes=frozenset({"preferred"}))
    assert {chosen_node(choose(kind, scheduler, demand, turn=turn)) for turn in range(4)} == {"preferred"}


# -- loads -------------------------------------------------------------------------------------------------------------


def test_least_loaded_compares_load_with_the_number_of_slots() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "big", slots=4)
    make_node(scheduler, "small", slots=2)
    fill(scheduler, "big", 1)
    fill(scheduler, "small", 1)
    assert chosen_node(choose(PolicyKind.LEAST_LOADED, scheduler)) == "big"


def test_least_loaded_compares_load_with_the_weight() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "heavy", slots=8, weight=3.0)
    make_node(scheduler, "light", slots=8)
    fill(scheduler, "heavy", 2)
    fill(scheduler, "light", 1)
    assert chosen_node(choose(PolicyKind.LEAST_LOADED, scheduler)) == "heavy"


def test_nodes_on_one_gpu_share_its_load() -> None:
    scheduler = make_scheduler()
    one, other, _ = (make_node(scheduler, name, slots=8) for name in "abc")
    one.group = other.group = GpuGroup("gpu", (one, other))
    fill(scheduler, "a", 3)
    fill(scheduler, "c", 1)
    for kind in (PolicyKind.LEAST_LOADED, PolicyKind.ADAPTIVE):
        assert {chosen_node(choose(kind, scheduler, turn=turn)) for turn in range(3)} == {"c"}


def test_round_robin_takes_the_free_nodes_in_turn() -> None:
    scheduler = make_scheduler()
    for name in "dcba":
        make_node(scheduler, name)
    fill(scheduler, "b", 1)
    turns = [chosen_node(choose(PolicyKind.ROUND_ROBIN, scheduler, turn=turn)) for turn in range(4)]
    assert turns == ["a", "c", "d", "a"]


def test_power_of_two_takes_the_less_loaded_of_two_that_are_drawn() -> None:
    scheduler = make_scheduler()
    loads = [5, 0, 3, 1, 4, 2]
    for number, load in enumerate(loads):
        make_node(scheduler, f"n{number}", slots=10)
        fill(scheduler, f"n{number}", load)
    rng = random.Random(3)
    shares = Counter(chosen_node(choose(PolicyKind.POWER_OF_TWO, scheduler, rng=rng)) for _ in range(3000))
    # Of the 15 pairs, the least loaded node is in 5, the next in 4 that do not have the first …
    for rank, number in enumerate(sorted(range(6), key=loads.__getitem__)):
        assert shares[f"n{number}"] == pytest.approx(3000 * (5 - rank) / 15, abs=100)
    assert shares["n0"] == 0


def test_power_of_two_draws_only_from_more_than_two_nodes() -> None:
    scheduler = make_scheduler()
    for name in "ab":
        make_node(scheduler, name, slots=10)
    fill(scheduler, "a", 1)
    rng = random.Random(3)
    state = rng.getstate()
    assert {chosen_node(choose(PolicyKind.POWER_OF_TWO, scheduler, rng=rng)) for _ in range(20)} == {"b"}
    assert rng.getstate() == state


@pytest.mark.parametrize("kind", TRIES_ONCE)
def test_the_policies_that_look_at_loads_only_take_the_first_free_slot(kind: PolicyKind) -> None:
    scheduler = make_scheduler(kind)
    make_node(scheduler, "hot")
    cold = make_node(scheduler, "cold", loaded=())
    demand = ask(residency=KEY_A)
    work = scheduler.experience.estimate(demand)
    question = Question([cold], demand, work, scheduler._fleet, 0.0, NOW, 0, random.Random(1))
    assert chosen_node(POLICIES[kind].accept(cold, question)) == "cold"


# -- adaptive ----------------------------------------------------------------------------------------------------------


def _have_session(scheduler: Scheduler, better: NodeAccount, worse: NodeAccount) -> None:
    scheduler.experience.prefixes.note_session(better.name, KEY_A, hash("s"), PROMPT.size)


def _set(**given: float) -> Callable[[Scheduler, NodeAccount, NodeAccount], None]:
    def change(_: Scheduler, better: NodeAccount, worse: NodeAccount) -> None:
        for name, value in given.items():
            setattr(worse, name, value)

    return change


def _fill_worse(scheduler: Scheduler, better: NodeAccount, worse: NodeAccount) -> None:
    fill(scheduler, worse.name, 1)


def _slow_worse(_: Scheduler, better: NodeAccount, worse: NodeAccount) -> None:
    worse.rates = type(worse.rates)(None)
    set_speed(worse, 0.5)


def _unload_worse(scheduler: Scheduler, better: NodeAccount, worse: NodeAccount) -> None:
    worse.residency.replace_with_report({}, asked_at=NOW)


@pytest.mark.parametrize(
    "change",
    [
        _slow_worse,
        _unload_worse,
        _set(foreign_load=0.9),
        _set(rtt_s=0.8),
        _set(slowness=3.0),
        _fill_worse,
        _have_session,
        _set(weight=0.5),
    ],
)
def test_adaptive_prefers_the_node_that_would_finish_first(
    change: Callable[[Scheduler, NodeAccount, NodeAccount], None],
) -> None:
    scheduler = make_scheduler()
    worse, better = make_node(scheduler, "w"), make_node(scheduler, "b")
    change(scheduler, better, worse)
    demand = Demand(A, session="s", prompt_tokens=4000, residency=KEY_A, prompt=PROMPT)
    for turn in range(4):
        assert chosen_node(choose(PolicyKind.ADAPTIVE, scheduler, demand, turn=turn)) == "b"


def test_adaptive_leaves_a_warm_but_busy_node_for_a_cold_idle_one_when_loading_is_quicker_than_waiting() -> None:
    scheduler = make_scheduler()
    make_node(scheduler, "warm")
    set_speed(make_node(scheduler, "cold", loaded=(), measured=False), load_s=3.0)
    placement = scheduler.place_now(ask_long(scheduler, 5000, node="warm"), NOW)  # 50 s
    assert placement is not None
    assert chosen_node(choose(PolicyKind.ADAPTIVE, scheduler)) == "cold"


def test_a_prediction_is_the_sum_of_its_parts() -> None:
    scheduler = make_scheduler()
    account = make_node(scheduler, "a", slots=1)  # 100 tokens/s
    account.rtt_s = 0.05
    plain = choose(PolicyKind.ADAPTIVE, scheduler, ask(tokens=200)).considered[0]
    assert plain.own_s == pytest.approx(0.05 + 2.0, abs=0.01)
    placement = scheduler.place_now(ask(tokens=200), NOW)
    assert placement is not None
    demand = ask(tokens=200, residency=KEY_A)
    work = scheduler.experience.estimate(demand)
    busy = Question([account], demand, work, scheduler._fleet, 0.0, NOW, 0, random.Random(1)).forecast(account)
    assert busy.wait_s == pytest.approx(0.05 + 2.0, abs=0.01)
    assert busy.own_s >= 0.05 + 4.0


def test_adaptive_spreads_streams_over_nodes_with_many_slots_by_their_speed() -> None:
    """Free slots are no reason to fill the node that is a little faster: other streams on its GPU slow a stream."""
    scheduler = make_scheduler()
    make_node(scheduler, "a", slots=64)
    make_node(scheduler, "b", slots=64, speed=0.8)
    counts = {"a": 0, "b": 0}
    for _ in range(64):
        placement = scheduler.place_now(ask(tokens=256), NOW)
        assert placement is not None
        scheduler.note_first_token(placement.placed, NOW)
        counts[placement.placed.account.name] += 1
    assert 33 <= counts["a"] <= 42, counts


def test_a_node_that_was_not_measured_is_taken_for_one_like_the_others() -> None:
    scheduler = make_scheduler()
    measured, _ = make_node(scheduler, "measured"), make_node(scheduler, "new", measured=False)
    for rates in (measured.rates, scheduler.experience.fleet_rates):
        rates.learn(A, tokens=200, eval_s=2.0)
    scheduler.experience.fleet_rates.learn(A, unread_tokens=2000, prompt_s=2.0)
    shares = {chosen_node(choose(PolicyKind.ADAPTIVE, scheduler, turn=turn)) for turn in range(4)}
    assert shares == {"measured", "new"}


@pytest.mark.parametrize("kind", list(PolicyKind))
def test_a_fleet_that_nobody_has_measured_serves(kind: PolicyKind) -> None:
    scheduler = make_scheduler(kind)
    for name in "ab":
        make_node(scheduler, name, measured=False, models=None, loaded=())
    for demand in (ask(), ask(None), ask("unknown", tokens=0)):
        assert chosen_node(choose(kind, scheduler, demand)) in {"a", "b"}


# -- what a server tells may be absurd ---------------------------------------------------------------------------------

FIGURES = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 5e-324, 1e-300, 1e308, 6.4e7])
absurd_answers = st.lists(
    st.fixed_dictionaries(
        {
            "model": st.sampled_from([A, "n:latest"]),
            "tokens": st.integers(-1, 1 << 70),
            "eval_s": FIGURES,
            "mean_streams": FIGURES,
            "unread_tokens": st.integers(-1, 1 << 70),
            "prompt_s": FIGURES,
            "load_s": FIGURES,
        }
    ),
    max_size=4,
)


@pytest.mark.parametrize("kind", list(PolicyKind))
@given(
    absurd_answers,
    st.floats(allow_nan=True) | st.just(2.0),
    st.integers(0, 9),
    st.none() | st.integers(1, 1 << 62),
    st.sampled_from([A, "o:latest", None]),
    st.sampled_from([None, 0, 1, 10**400]),
)
@example([], 2.0, 0, None, A, None)
@example([], 1e10, 0, None, A, None)
def test_one_absurd_node_leaves_the_others_ranked(
    kind: PolicyKind,
    answers: list[dict[str, object]],
    foreign_load: float,
    in_flight: int,
    reported_parallel: int | None,
    model: str | None,
    max_tokens: int | None,
) -> None:
    """A utilisation of 200 % must not make the choice for every request divide by zero."""
    scheduler = make_scheduler(kind)
    bad = make_node(scheduler, "absurd", slots=None, models=None, measured=False)
    fast = make_node(scheduler, "fast", models=None)
    slow = make_node(scheduler, "slow", models=None, speed=0.1)
    bad.reported_parallel = reported_parallel
    bad.foreign_load = foreign_load
    for answer in answers:
        bad.rates.learn(**answer)  # type: ignore[arg-type]
        scheduler.experience.fleet_rates.learn(**answer)  # type: ignore[arg-type]
    for _ in range(in_flight):
        scheduler.place_now(ask(node="absurd"), NOW)
    demand = ask(model, tokens=max_tokens)  # type: ignore[arg-type]
    best = chosen_node(choose(kind, scheduler, demand))
    assert best in {"absurd", "fast", "slow"} or kind is PolicyKind.ADAPTIVE  # it may also wait for the absurd one
    if kind is PolicyKind.ADAPTIVE:
        if model == A and max_tokens != 0:
            assert best != "slow"
        assert chosen_node(choose(kind, scheduler, demand, accounts=[slow, fast])) in (
            {"fast"} if model == A and max_tokens != 0 else {"fast", "slow"}
        )
