"""Which member gets which layers, and what the plan says when the model does not fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from gpumesh.pool_spec import KvType, PoolSpec
from gpumesh.pools.base import HostOffer, PoolPlan
from gpumesh.pools.planning.memory import CPU_RESERVE_BYTES
from gpumesh.pools.planning.plan import plan_pool
from tests.pools.planning.pools import MIB, RTX_4090, cpu, gpu, host, llama_70b, llama_f16, paths, pool, small_model


def layers_of(plan: PoolPlan) -> dict[str, int]:
    return {member.node: member.layers for member in plan.members}


def test_two_4090_hold_a_70b_that_neither_holds_alone() -> None:
    plan = plan_pool(pool("a", "b"), llama_70b(), [host("a"), host("b")], paths(b=0.5))
    assert plan.fits
    assert sum(layers_of(plan).values()) == 81  # 80 blocks and the output
    assert [worker.node for worker in plan.workers] == ["b"]
    assert all(share.needed_bytes <= share.offered_bytes for member in plan.members for share in member.shares)
    assert plan.speed is not None
    assert plan.load_s is not None
    assert plan.sent_bytes == plan.workers[0].shares[0].weights_bytes


def test_the_head_holds_as_much_as_it_can_and_the_output() -> None:
    plan = plan_pool(pool("a", "b"), llama_70b(), [host("a"), host("b")], paths(b=0.5))
    head, worker = plan.head.shares[0], plan.workers[0].shares[0]
    assert (worker.first_layer, head.first_layer) == (0, worker.layers)
    assert head.layers > worker.layers
    assert head.offered_bytes - head.needed_bytes < 520 * MIB  # not one layer more
    assert [member.node for member, _ in plan.used_shares] == ["b", "a"]


def test_a_head_that_holds_the_model_alone_gets_all_of_it() -> None:
    plan = plan_pool(pool("a", "b"), small_model(), [host("a"), host("b")], paths(b=0.5))
    assert layers_of(plan) == {"a": 11, "b": 0}
    assert plan.workers == ()
    assert any("needs no pool" in advice for advice in plan.advice)
    assert any("b is not needed" in advice for advice in plan.advice)


def test_the_nearest_worker_is_taken_and_the_others_are_not() -> None:
    offers = [host("a"), host("far"), host("near")]
    plan = plan_pool(pool("a", "far", "near"), llama_70b(), offers, paths(far=40.0, near=0.5))
    assert [worker.node for worker in plan.workers] == ["near"]
    assert [member.node for member in plan.members] == ["a", "near", "far"]


def test_a_worker_with_more_memory_saves_two_round_trips() -> None:
    """Two near workers would do; one that is a little farther is enough alone."""
    offers = [host("a"), host("b", gpu(12000)), host("c", gpu(12000)), host("d")]
    plan = plan_pool(pool("a", "b", "c", "d"), llama_70b(), offers, paths(b=10.0, c=10.0, d=12.0))
    assert [worker.node for worker in plan.workers] == ["d"]


def test_a_slow_head_leaves_the_layers_to_a_fast_worker() -> None:
    offers = [host("a", cpu(64000)), host("b")]
    plan = plan_pool(pool("a", "b"), small_model(), offers, paths(b=0.5))
    assert layers_of(plan) == {"a": 0, "b": 11}
    assert not any("not needed" in advice for advice in plan.advice)


def test_a_slow_head_keeps_what_the_worker_cannot_hold() -> None:
    offers = [host("a", cpu(64000)), host("b", gpu(5500))]
    plan = plan_pool(pool("a", "b"), small_model(layers=60), offers, paths(b=0.5))
    assert plan.fits
    head = plan.head.shares[0]
    assert head.first_layer == 0
    assert 0 < head.layers < 30
    assert head.weights_bytes == head.layers * 100 * MIB + MIB  # its CPU also has the token embeddings


def test_a_cpu_that_has_output_and_embeddings_has_shared_ones_once() -> None:
    shape = small_model(tied_output=True, input_bytes=300 * MIB, output_bytes=301 * MIB)
    alone = plan_pool(pool("a"), shape, [host("a", cpu(9000))], {})
    assert alone.head.shares[0].weights_bytes == 1301 * MIB
    split = plan_pool(pool("a", "b", split=(5, 5)), shape, [host("a", cpu(9000)), host("b", cpu(9000))], paths(b=1.0))
    assert [share.weights_bytes // MIB for _, share in split.used_shares] == [800, 801]


def test_a_head_that_cannot_hold_the_token_embeddings_is_too_small() -> None:
    offers = [host("a", cpu(100)), host("b")]
    plan = plan_pool(pool("a", "b"), small_model(input_bytes=300 * MIB), offers, paths(b=1.0))
    assert 200 < missing_mib(plan) < 250


def test_a_far_worker_is_not_taken_where_the_slow_head_is_faster() -> None:
    offers = [host("a", cpu(64000)), host("b")]
    plan = plan_pool(pool("a", "b"), small_model(layers=3), offers, paths(b=300.0))
    assert plan.workers == ()


def test_unknown_rates_leave_the_speed_unknown_and_still_give_a_plan() -> None:
    offers = [host("a", gpu(bytes_per_s=None)), host("b")]
    plan = plan_pool(pool("a", "b"), llama_70b(), offers, paths(b=None))
    assert plan.fits
    assert plan.speed is None
    assert [worker.node for worker in plan.workers] == ["b"]
    assert not plan.advice
    far = plan_pool(pool("a", "b"), llama_70b(), offers, paths(b=60.0))
    assert far.speed is None
    assert any("allow one stream at most" in advice for advice in far.advice)


def test_several_gpus_of_a_host_are_one_worker() -> None:
    offers = [host("a"), host("b", gpu(12000, index=0), gpu(12000, index=1))]
    plan = plan_pool(pool("a", "b"), llama_70b(), offers, paths(b=0.5))
    assert plan.fits
    assert [share.device.index for _, share in plan.used_shares] == [0, 1, 0]
    assert len(plan.workers) == 1


def test_a_limit_counts_for_all_devices_of_a_host_together() -> None:
    offers = [host("a", gpu(index=0), gpu(index=1), limit_mib=30000)]
    plan = plan_pool(pool("a"), llama_70b(), offers, {})
    first, second = (share.offered_bytes for share in plan.head.shares)
    assert first + second < 30000 * MIB
    assert not plan.fits


def test_a_cpu_gives_at_most_its_limit() -> None:
    plan = plan_pool(pool("a"), small_model(), [host("a", cpu(64000), limit_mib=500)], {})
    assert plan.head.shares[0].offered_bytes == 500 * MIB - CPU_RESERVE_BYTES
    assert not plan.fits


def test_what_does_not_fit_says_by_how_much() -> None:
    offers = [host("a"), host("b", gpu(12000))]
    plan = plan_pool(pool("a", "b"), llama_70b(), offers, paths(b=0.5))
    missing = missing_mib(plan)
    assert not plan.fits
    enough = [host("a"), host("b", gpu(12000 + missing + 1, total_mib=24564))]
    assert plan_pool(pool("a", "b"), llama_70b(), enough, paths(b=0.5)).fits
    too_little = [host("a"), host("b", gpu(12000 + missing - 2, total_mib=24564))]
    assert not plan_pool(pool("a", "b"), llama_70b(), too_little, paths(b=0.5)).fits


def missing_mib(plan: PoolPlan) -> int:
    match = re.fullmatch(r"The model does not fit: ([\d,]+) MiB are missing\.", plan.problems[0])
    assert match, plan.problems
    return int(match[1].replace(",", ""))


OFFERS = [host("a"), host("b")]


@pytest.mark.parametrize(
    ("key", "read", "fields"),
    [
        ("context", int, {"context": 32768}),
        ("parallel", int, {"context": 4096, "parallel": 16}),
        ("kv_type", KvType, {"context": 16384}),
    ],
)
def test_advice_is_true(key: str, read: type, fields: dict[str, int]) -> None:
    """What is said to fit does, and the next larger value does not."""
    spec = pool("a", "b", **fields)
    plan = plan_pool(spec, llama_70b(), OFFERS, paths(b=0.5))
    assert not plan.fits
    value = read(next(match[1] for advice in plan.advice if (match := re.search(rf"{key}: (\w+)", advice))))
    assert fits(replace(spec, **{key: value}))
    if key != "kv_type":
        assert not fits(replace(spec, **{key: value + {"context": 256, "parallel": 1}[key]}))


def fits(spec: PoolSpec) -> bool:
    return plan_pool(spec, llama_70b(), OFFERS, paths(b=0.5)).fits


def test_the_best_quantisation_that_fits_is_named() -> None:
    plan = plan_pool(pool("a"), llama_70b(), [host("a", gpu(48000, total_mib=48000))], {})
    assert plan.fits
    plan = plan_pool(pool("a"), llama_70b(), [host("a", gpu(40000, total_mib=40000))], {})
    assert [advice for advice in plan.advice if "quantisation" in advice] == [
        "It would fit with a file of the quantisation IQ4_XS (36.6 GiB)."
    ]


def test_several_changes_are_named_where_one_is_not_enough() -> None:
    spec = pool("a", context=65536, parallel=8)
    plan = plan_pool(spec, llama_70b(), [host("a", gpu(44000, total_mib=48000))], {})
    assert plan.advice == (
        "It would fit with parallel: 1, kv_type: q8_0 and a file of the quantisation IQ3_XXS (26.7 GiB).",
    )


def test_what_no_change_makes_fit_says_so() -> None:
    plan = plan_pool(pool("a"), llama_70b(), [host("a", gpu(4000))], {})
    assert plan.advice == ("No quantisation is small enough: the pool needs more members, or a smaller model.",)


def test_memory_that_ollama_holds_counts_only_if_it_may_be_unloaded() -> None:
    offers = [host("a"), host("b", gpu(4000, held_by_others=20000 * MIB))]
    plan = plan_pool(pool("a", "b"), llama_70b(), offers, paths(b=0.5))
    assert not plan.fits
    assert plan.advice[0] == "It would fit if Ollama on b unloaded its models (unload: true)."
    assert plan_pool(pool("a", "b", unload=True), llama_70b(), offers, paths(b=0.5)).fits


def test_one_node_alone_is_advised_where_it_is_faster() -> None:
    far = plan_pool(pool("a", "b"), llama_70b(), [host("a", gpu(36000, total_mib=36000)), host("b")], paths(b=40.0))
    assert far.workers
    assert any(re.match(r"a alone would be faster with the quantisation Q3_K_M", advice) for advice in far.advice)
    near = plan_pool(pool("a", "b"), llama_70b(), [host("a"), host("b")], paths(b=0.2))
    assert not any("alone" in advice for advice in near.advice)


def test_a_draft_is_offered_where_round_trips_dominate() -> None:
    plan = plan_pool(pool("a", "b"), llama_70b(), OFFERS, paths(b=60.0))
    assert any("draft:" in advice for advice in plan.advice)
    near = plan_pool(pool("a", "b"), llama_70b(), OFFERS, paths(b=0.2))
    assert not any("draft:" in advice for advice in near.advice)


def test_a_draft_model_takes_memory_of_the_head() -> None:
    draft = small_model(layers=16, layer_mib=60, vocabulary=128256)
    spec = pool("a", "b", draft="/models/small.gguf")
    plan = plan_pool(spec, llama_70b(), OFFERS, paths(b=40.0), draft=draft)
    alone = plan_pool(pool("a", "b"), llama_70b(), OFFERS, paths(b=40.0))
    share = plan.head.shares[0]
    assert share.draft_bytes > 16 * 60 * MIB
    assert share.needed_bytes <= share.offered_bytes
    assert plan.head.layers < alone.head.layers
    assert plan.speed is not None
    assert plan.speed.draft_tokens_per_s is not None
    assert plan.speed.draft_tokens_per_s > plan.speed.tokens_per_s


def test_a_draft_model_on_a_cpu_needs_what_was_measured() -> None:
    """llama-server with `-md … -devd none -np 2 -c 4096`: 6.41 MiB of weights, 8 of cache, 6.01 of compute buffer."""
    draft = llama_f16(layers=2, embedding=256, heads=4, kv_heads=4, feed_forward=512)
    plan = plan_pool(
        pool("a", context=2048, parallel=2, draft="/d.gguf"), small_model(), [host("a", cpu(9000))], {}, draft=draft
    )
    assert plan.head.shares[0].draft_bytes / MIB == pytest.approx(6.41 + 8 + 6.01, rel=0.01)


def test_a_member_that_cannot_take_part_is_left_out() -> None:
    broken = HostOffer("c", problem="it has no ggml-rpc-server", hint="install llama.cpp there")
    plan = plan_pool(pool("a", "b", "c"), llama_70b(), [*OFFERS, broken], paths(b=0.5, c=0.5))
    assert plan.fits
    assert layers_of(plan)["c"] == 0
    assert plan.advice[0] == "c cannot take part: it has no ggml-rpc-server; install llama.cpp there."
    without = plan_pool(pool("a", "c"), llama_70b(), [OFFERS[0], broken], paths(c=0.5))
    assert without.problems[1] == "c cannot take part: it has no ggml-rpc-server; install llama.cpp there."


def test_a_head_that_cannot_take_part_is_a_problem() -> None:
    broken = HostOffer("a", problem="it has no llama-server")
    plan = plan_pool(pool("a", "b"), small_model(), [broken, OFFERS[1]], paths(b=0.5))
    assert plan.problems[0] == "a cannot take part: it has no llama-server."
    assert plan.head.layers == 0


def test_a_written_split_is_kept() -> None:
    plan = plan_pool(pool("a", "b", split=(41, 39)), llama_70b(), OFFERS, paths(b=0.5))
    assert plan.fits
    assert layers_of(plan) == {"a": 42, "b": 39}  # the output is with the head's layers


def test_a_written_split_that_is_too_much_names_the_member() -> None:
    plan = plan_pool(pool("a", "b", split=(30, 50)), llama_70b(), OFFERS, paths(b=0.5))
    assert len(plan.problems) == 1
    assert re.fullmatch(
        rf"The layers that split: gives b need [\d,]+ MiB of its {RTX_4090}, which can give [\d,]+ MiB: [\d,]+ MiB are "
        r"missing\.",
        plan.problems[0],
    )
    assert plan.advice == ("It would fit with the split that the plan finds: leave `split` out.",)


def test_a_written_split_for_a_member_that_cannot_take_part_is_refused() -> None:
    broken = HostOffer("b", problem="it is away")
    plan = plan_pool(pool("a", "b", split=(40, 40)), llama_70b(), [host("a"), broken], paths(b=0.5))
    assert plan.problems == (
        "split: gives layers to a member that cannot take part.",
        "b cannot take part: it is away.",
    )


def test_a_slow_node_that_holds_the_model_is_not_called_better() -> None:
    offers = [host("a", gpu(6000)), host("b", gpu(6000)), host("slow", cpu(64000, 10e9))]
    plan = plan_pool(pool("a", "b", "slow"), small_model(layers=60), offers, paths(b=0.5, slow=0.5))
    assert [worker.node for worker in plan.workers] == ["b"]
    assert not any("slow alone" in advice for advice in plan.advice)


def test_a_cache_that_cannot_be_quantised_is_not_advised() -> None:
    shape = llama_70b(head_size=80)
    plan = plan_pool(pool("a", "b", context=32768), shape, OFFERS, paths(b=0.5))
    assert not plan.fits
    assert not any("kv_type" in advice for advice in plan.advice)


def test_a_written_split_must_have_all_layers() -> None:
    plan = plan_pool(pool("a", "b", split=(30, 30)), llama_70b(), OFFERS, paths(b=0.5))
    assert plan.problems == ("split: gives away 60 layers, and the model has 80.",)


def test_a_written_split_over_several_gpus_follows_their_memory() -> None:
    offers = [host("a"), host("b", gpu(8000, index=0), gpu(16000, index=1))]
    plan = plan_pool(pool("a", "b", split=(42, 38)), llama_70b(), offers, paths(b=0.5))
    first, second = (share.layers for share in plan.workers[0].shares)
    assert first + second == 38
    assert first < second


@pytest.mark.parametrize(
    ("spec", "shape", "problem"),
    [
        (pool("a", parallel=300), small_model(), "parallel: 300 is more than"),
        (pool("a", kv_type=KvType.Q8_0), small_model(head_size=40), "heads of 40 numbers"),
        (pool("a"), small_model(obstacles=("it is a picture",)), "The model cannot be run: it is a picture."),
    ],
)
def test_other_problems_are_named(spec: PoolSpec, shape: object, problem: str) -> None:
    plan = plan_pool(spec, shape, [host("a")], {})  # type: ignore[arg-type]
    assert problem in plan.problems[0]


def test_a_context_beyond_the_trained_one_is_said() -> None:
    plan = plan_pool(pool("a", context=8192), small_model(trained_context=2048), [host("a")], {})
    assert "The model was trained for 2048 tokens, and context: 8192 is more." in plan.advice
