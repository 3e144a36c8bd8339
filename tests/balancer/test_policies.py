import random
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpumesh.balancer.base import Candidate, Demand
from gpumesh.balancer.policies import POLICIES, predict_duration_s
from gpumesh.topology import BackendKind, PolicyKind

RNG = random.Random(7)


def node(name: str, **given: object) -> Candidate:
    fields: dict[str, object] = {"kind": BackendKind.OLLAMA, "usable": True, "models": frozenset({"m:latest"})}
    return Candidate(name=name, **{**fields, "loaded": frozenset({"m:latest"}), **given})  # type: ignore[arg-type]


candidates = st.lists(
    st.builds(
        node,
        name=st.sampled_from("abcdefgh"),
        in_flight=st.integers(0, 9),
        limit=st.none() | st.integers(1, 4),
        rtt_ms=st.none() | st.floats(0, 900),
        foreign_load=st.none() | st.floats(0, 1),
        tokens_per_s=st.dictionaries(st.just("m:latest"), st.floats(0.1, 500)),
    ),
    unique_by=lambda candidate: candidate.name,
    max_size=8,
)


@pytest.mark.parametrize("kind", list(PolicyKind))
@given(nodes=candidates, turn=st.integers(0, 10**9))
def test_every_policy_ranks_each_candidate_exactly_once(kind: PolicyKind, nodes: list[Candidate], turn: int) -> None:
    ranked = POLICIES[kind](nodes, Demand("m"), turn, RNG)
    assert sorted(ranked) == sorted(candidate.name for candidate in nodes)


@pytest.mark.parametrize("kind", list(PolicyKind))
def test_equal_nodes_get_equal_shares(kind: PolicyKind) -> None:
    nodes = [node("a"), node("b"), node("c")]
    rng = random.Random(1)
    first = Counter(POLICIES[kind](nodes, Demand("m"), turn, rng)[0] for turn in range(300))
    assert set(first) == {"a", "b", "c"}
    assert all(70 <= count <= 130 for count in first.values())


def test_least_loaded_compares_load_with_the_number_of_slots() -> None:
    nodes = [node("big", in_flight=2, limit=4), node("small", in_flight=1, limit=1)]
    assert POLICIES[PolicyKind.LEAST_LOADED](nodes, Demand("m"), 0, RNG)[0] == "big"


def test_nodes_on_one_gpu_share_its_load() -> None:
    nodes = [node("a", in_flight=3, group="g"), node("b", group="g"), node("c", in_flight=1)]
    assert POLICIES[PolicyKind.LEAST_LOADED](nodes, Demand("m"), 0, RNG)[0] == "c"


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (node("b", tokens_per_s={"m:latest": 100.0}), node("w", tokens_per_s={"m:latest": 50.0})),
        (node("b"), node("w", loaded=frozenset())),
        (node("b"), node("w", foreign_load=0.9)),
        (node("b", rtt_ms=1.0), node("w", rtt_ms=800.0)),
        (node("b", in_flight=0, limit=1), node("w", in_flight=1, limit=1)),
        (node("b", sessions=frozenset({"s"})), node("w")),
        (node("b", weight=2.0), node("w")),
    ],
)
def test_adaptive_prefers_the_node_that_would_finish_first(better: Candidate, worse: Candidate) -> None:
    demand = Demand("m", session="s", prompt_tokens=4000)
    for turn in range(4):
        assert POLICIES[PolicyKind.ADAPTIVE]([worse, better], demand, turn, RNG)[0] == "b"


def test_adaptive_leaves_a_warm_but_busy_node_for_a_cold_idle_one_when_loading_is_quicker_than_waiting() -> None:
    warm = node("warm", in_flight=4, limit=1, tokens_per_s={"m:latest": 20.0})
    cold = node("cold", loaded=frozenset(), load_s={"m:latest": 3.0}, tokens_per_s={"m:latest": 20.0})
    assert POLICIES[PolicyKind.ADAPTIVE]([warm, cold], Demand("m"), 0, RNG)[0] == "cold"


def test_a_prediction_is_the_sum_of_its_parts() -> None:
    plain = node("a", tokens_per_s={"m:latest": 100.0}, rtt_ms=50.0)
    demand = Demand("m", max_tokens=200)
    assert predict_duration_s(plain, demand, queued_ahead=0, unknown_rate=1.0) == pytest.approx(0.05 + 2.0)
    busy = node("a", tokens_per_s={"m:latest": 100.0}, rtt_ms=50.0, limit=1)
    assert predict_duration_s(busy, demand, queued_ahead=1, unknown_rate=1.0) == pytest.approx(0.05 + 4.0)


def test_adaptive_spreads_streams_over_nodes_with_many_slots_by_their_speed() -> None:
    """Free slots are no reason to fill the node that is a little faster: other streams on its GPU slow a stream."""
    counts = {"a": 0, "b": 0}
    for turn in range(64):
        nodes = [
            node("a", tokens_per_s={"m:latest": 100.0}, limit=64, in_flight=counts["a"]),
            node("b", tokens_per_s={"m:latest": 80.0}, limit=64, in_flight=counts["b"]),
        ]
        counts[POLICIES[PolicyKind.ADAPTIVE](nodes, Demand("m"), turn, RNG)[0]] += 1
    assert 33 <= counts["a"] <= 42, counts


RATES = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 5e-324, 1e-300, 1e308, 6.4e7])
absurd = st.builds(
    node,
    name=st.just("absurd"),
    in_flight=st.integers(0, 9),
    limit=st.none() | st.integers(1, 1 << 62),
    foreign_load=st.floats(allow_nan=False) | st.just(2.0),
    tokens_per_s=st.dictionaries(st.sampled_from(["m:latest", "n:latest"]), RATES),
    load_s=st.dictionaries(st.sampled_from(["m:latest", "o:latest"]), st.floats(0, 1e300)),
)


@pytest.mark.parametrize("kind", list(PolicyKind))
@given(absurd, st.sampled_from(["m", "o", None]), st.sampled_from([None, 1, 10**400]))
@example(node("absurd", foreign_load=2.0), "m", None)
@example(node("absurd", foreign_load=1e10), "m", None)
@example(node("absurd", tokens_per_s={"m:latest": 5e-324}), "m", None)
@example(node("absurd", tokens_per_s={"m:latest": float("nan")}), "m", None)
def test_one_absurd_node_leaves_the_others_ranked(
    kind: PolicyKind, bad: Candidate, model: str | None, max_tokens: int | None
) -> None:
    """A utilisation of 200 % must not make the ranking of every request divide by zero."""
    fast = node("fast", tokens_per_s={"m:latest": 100.0})
    slow = node("slow", tokens_per_s={"m:latest": 10.0})
    ranked = POLICIES[kind]([bad, fast, slow], Demand(model, max_tokens=max_tokens), 0, random.Random(1))
    assert sorted(ranked) == ["absurd", "fast", "slow"]
    if kind is PolicyKind.ADAPTIVE and model == "m":
        assert ranked.index("fast") < ranked.index("slow")
