"""The line of X-GPUMesh-Why: what it tells, and that no name and no number can break it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.forecast import Forecast
from gpumesh.balancer.scheduling.explanation import MAX_LINE_CHARS, describe_forecast, explain_placement
from gpumesh.balancer.scheduling.scheduler import Placement
from gpumesh.balancer.work import Work
from gpumesh.topology import PolicyKind
from tests.balancer.placed import make_placed

MODEL = "qwen2.5:14b"
PARTS: dict[str, float] = {
    "way_s": 0.0,
    "wait_s": 0.0,
    "load_s": 0.0,
    "read_s": 0.0,
    "write_s": 0.0,
    "others_s": 0.0,
    "evicted_s": 0.0,
}


def forecast(node: str, *, unread_tokens: float = 1.0, pushed_out: Sequence[str] = (), **parts: float) -> Forecast:
    values: dict[str, Any] = {**PARTS, **parts}
    return Forecast(
        node,
        is_free=True,
        unread_tokens=unread_tokens,
        own_read_s=values["read_s"],
        pushed_out=tuple(pushed_out),
        total_s=sum(values.values()),
        **values,
    )


ICELAND = forecast("iceland", way_s=0.06, read_s=0.3, write_s=0.8, unread_tokens=1100.0)
VENGEANCE = forecast("vengeance", way_s=0.01, load_s=5.7, read_s=0.4, write_s=0.8, pushed_out=["llama3.1:8b"])


def placement(
    chosen: Forecast, *others: Forecast, key: ResidencyKey | None = None, prompt_tokens: float = 4200.0
) -> Placement:
    demand = Demand(MODEL, residency=key or ResidencyKey(MODEL))
    placed = make_placed(NodeAccount(chosen.node), demand, Work(prompt_tokens, 80.0), now=0.0)
    return Placement(placed, chosen, (*others, chosen))


def explain(*forecasts: Forecast, policy: PolicyKind = PolicyKind.ADAPTIVE, **more: Any) -> str:
    queue = {name: more.pop(name) for name in ("queue_s", "failed_attempts") if name in more}
    return explain_placement(placement(*forecasts, **more), policy=policy, **queue)


def test_the_example_of_the_documentation() -> None:
    assert explain(ICELAND, VENGEANCE) == (
        "iceland 1.2 s = 0.06 way + 0.0 wait + 0.3 read 1,100 of 4,200 + 0.8 write; "
        "vengeance 6.9 s = load qwen2.5:14b, pushes out llama3.1:8b"
    )


def test_the_chosen_node_comes_first_and_the_others_by_their_cost() -> None:
    waits = forecast("busy", wait_s=1.0, write_s=0.8)
    line = explain(VENGEANCE, waits, ICELAND)
    assert [entry.split()[0] for entry in line.split("; ")] == ["vengeance", "iceland", "busy"]
    assert "0.01 way + 0.0 wait + 5.7 load qwen2.5:14b, pushes out llama3.1:8b + 0.4 read" in line
    assert line.endswith("busy 1.8 s = 1.0 wait + 0.8 write")


def test_costs_of_others_are_parts_of_the_sum() -> None:
    line = explain(forecast("a", write_s=1.0, others_s=0.5, evicted_s=2.0), prompt_tokens=0.0)
    assert line == "a 3.5 s = 0.0 way + 0.0 wait + 0.0 read + 1.0 write + 0.5 delay of others + 2.0 reloads later"


def test_another_context_of_a_model_in_memory_is_told() -> None:
    reload = forecast("a", load_s=5.0, write_s=1.0, pushed_out=[MODEL])
    assert "load qwen2.5:14b anew with num_ctx 8,192 + " in explain(reload, key=ResidencyKey(MODEL, 8192))
    assert "load qwen2.5:14b anew + " in explain(reload)
    many = forecast("a", load_s=5.0, write_s=1.0, pushed_out=["b:1", "c:1", "d:1", "e:1"])
    assert "load qwen2.5:14b, pushes out b:1, c:1 and 2 more + " in explain(many)


def test_what_happened_before_is_told() -> None:
    assert explain(ICELAND, queue_s=2.31).endswith(" write; waited 2.3 s in the queue before")
    assert explain(ICELAND, queue_s=0.001).endswith(" write")
    assert explain(ICELAND, failed_attempts=1).endswith(" write; after 1 failed attempt")
    assert explain(ICELAND, policy=PolicyKind.ROUND_ROBIN).endswith("chosen by round-robin, which does not look at it")


def test_the_rank_of_a_node_in_the_file_is_told_where_nodes_differ_in_it() -> None:
    slow = forecast("attic", write_s=2.0)
    fast = forecast("pod", write_s=0.5)
    tiers = {"attic": 1, "pod": 2}
    line = explain_placement(placement(slow, fast), policy=PolicyKind.ADAPTIVE, tiers=tiers)
    assert line.startswith("attic (tier 1) 2.0 s = ")
    assert line.endswith("; pod (tier 2) 0.5 s = write")
    same = explain_placement(placement(slow, fast), policy=PolicyKind.ADAPTIVE, tiers={"attic": 2, "pod": 2})
    assert "tier" not in same
    preferred = placement(slow, fast)
    demand = Demand(MODEL, residency=ResidencyKey(MODEL), preferred_nodes=frozenset({"attic"}))
    placed = make_placed(NodeAccount("attic"), demand, Work(0.0, 80.0), now=0.0)
    line = explain_placement(replace(preferred, placed=placed), policy=PolicyKind.ADAPTIVE)
    assert line.startswith("attic (preferred) 2.0 s = ")
    assert "; pod (tier 1) 0.5 s" in line


def test_a_pinned_model_that_would_have_to_go_is_named() -> None:
    pins = forecast("attic", load_s=4.0, write_s=1.0, evicted_s=3608.0, pushed_out=["a:1", "b:1"])
    line = explain_placement(placement(ICELAND, pins), policy=PolicyKind.ADAPTIVE, pinned={"b:1"})
    assert line.endswith("; attic 3,613.0 s = reloads later of pinned b:1")
    assert "pinned" not in explain_placement(placement(ICELAND, pins), policy=PolicyKind.ADAPTIVE, pinned={"c:1"})


def test_a_long_line_counts_the_nodes_that_it_leaves_out() -> None:
    nodes = [forecast(f"node-{number}", write_s=1.0 + number) for number in range(1000)]
    line = explain(*nodes)
    named = line.count(" s = ")
    assert len(line) <= MAX_LINE_CHARS
    assert named > 20
    assert line.endswith(f"; and {1000 - named:,} more")


def test_a_forecast_alone_is_a_sum_without_the_node() -> None:
    assert describe_forecast(ICELAND, ResidencyKey(MODEL), 4200.0) == (
        "0.06 way + 0.0 wait + 0.3 read 1,100 of 4,200 + 0.8 write"
    )


seconds = st.floats(allow_nan=True, allow_infinity=True)


@given(
    names=st.lists(st.text(), min_size=1, max_size=12),
    parts=st.lists(seconds, min_size=9, max_size=9),
    context=st.integers(1, 10**30),
)
def test_no_name_and_no_number_breaks_the_line(names: list[str], parts: list[float], context: int) -> None:
    def hostile(name: str) -> Forecast:
        return forecast(
            name, **dict(zip(PARTS, parts, strict=False)), unread_tokens=parts[7], pushed_out=[*names, names[0] * 50]
        )

    key = ResidencyKey(names[0] * 20, context)
    line = explain(*map(hostile, dict.fromkeys(names)), key=key, prompt_tokens=parts[8], queue_s=parts[0])
    assert line.isascii()
    assert line.isprintable()
    assert len(line) <= MAX_LINE_CHARS
    assert not any(math.isnan(part) for part in parts[:7]) or "?" in line
