"""The forecast of a pool's speed: against published measurements, and how each part of a pool changes it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.pools.base import DeviceOffer, DeviceShare, MemberPlan, ModelShape, PathKind, SpeedForecast, WorkerPath
from gpumesh.pools.planning.gpu_rates import find_bytes_per_s, learn_bytes_per_s
from gpumesh.pools.planning.rpc_traffic import estimate_step
from gpumesh.pools.planning.speed import forecast_load, forecast_prompt_way_s, forecast_speed

CONTEXT = 8192
MB = 1_000_000
# Llama 3 70B in Q4_K_M: 42.5 GB.
LLAMA_70B = ModelShape(
    architecture="llama",
    name="Llama 3 70B",
    file_type="Q4_K_M",
    layer_bytes=(510 * MB,) * 80,
    input_bytes=590 * MB,
    output_bytes=860 * MB,
    kv_elements=(2 * 1024,) * 80,
    embedding=8192,
    vocabulary=128_256,
    heads=64,
    trained_context=8192,
    parameters=70_600_000_000,
    file_bytes=42_520 * MB,
)
DRAFT_1B = replace(
    LLAMA_70B,
    layer_bytes=(40 * MB,) * 16,
    output_bytes=200 * MB,
    input_bytes=0,
    kv_elements=(2 * 512,) * 16,
    embedding=2048,
)
HOME = WorkerPath(PathKind.HEAD_TO_WORKER, 40.0, protocol=7)


def gpu(name: str) -> DeviceOffer:
    return DeviceOffer(name, 0, None, 0, find_bytes_per_s(name))


def share(shape: ModelShape, device: DeviceOffer, first: int, layers: int) -> DeviceShare:
    inside = range(first, min(first + layers, shape.layers))
    kv_bytes = 2 * CONTEXT * sum(shape.kv_elements[layer] for layer in inside)
    return DeviceShare(device, first, layers, sum(shape.layer_bytes[layer] for layer in inside), kv_bytes, 0, 0)


def pool(
    path: WorkerPath | None = HOME, device: DeviceOffer | None = None, shape: ModelShape = LLAMA_70B
) -> list[MemberPlan]:
    """The worker has the first half of the layers, and the head the second one with the output. Without a path, both
    devices are the head's."""
    device = device or gpu("NVIDIA GeForce RTX 4090")
    half = shape.layers // 2
    first = share(shape, device, 0, half)
    second = share(shape, device, half, shape.layers + 1 - half)
    if path is None:
        return [MemberPlan("head", True, (first, second))]
    return [MemberPlan("head", True, (second,)), MemberPlan("worker", False, (first,), path)]


def forecast(
    members: list[MemberPlan], parallel: int = 1, shape: ModelShape = LLAMA_70B, **options: object
) -> SpeedForecast:
    found = forecast_speed(shape, members, context=CONTEXT, parallel=parallel, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


# github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference: two cards of one host, 512 tokens of this model.
@pytest.mark.parametrize(("card", "measured"), [("GeForce RTX 3090", 16.57), ("GeForce RTX 4090", 19.22)])
def test_two_cards_of_one_host_are_as_fast_as_published(card: str, measured: float) -> None:
    predicted = forecast(pool(None, gpu(card)), filled=256)
    assert predicted.tokens_per_s == pytest.approx(measured, rel=0.15)
    assert predicted.round_trips_ms == 0.0


def test_a_distance_adds_one_round_trip_for_each_token() -> None:
    near, far = forecast(pool(None)), forecast(pool())
    assert far.compute_ms == near.compute_ms
    assert far.round_trips_ms == pytest.approx(40)
    assert far.tokens_per_s == pytest.approx(1000 / (far.compute_ms + far.round_trips_ms))


def test_an_old_protocol_waits_for_each_layer_of_a_new_graph() -> None:
    """Two new graphs in 256 tokens, with three waits for each of the worker's 40 layers."""
    for protocol in (5, None):
        far = forecast(pool(replace(HOME, protocol=protocol)))
        assert far.round_trips_ms == pytest.approx(40 * (1 + 2 * 3 * 40 / 256))


def test_what_is_unknown_gives_no_forecast() -> None:
    assert forecast_speed(LLAMA_70B, pool(device=gpu("NVIDIA Nothing 1")), context=CONTEXT, parallel=1) is None
    no_rtt = WorkerPath(PathKind.THROUGH_US, None)
    assert forecast_speed(LLAMA_70B, pool(no_rtt), context=CONTEXT, parallel=1) is None
    assert forecast_prompt_way_s(LLAMA_70B, pool(no_rtt), tokens=100) is None


def test_streams_that_are_decoded_together_share_the_round_trips() -> None:
    one, four = forecast(pool()), forecast(pool(), 4)
    assert four.tokens_per_s == pytest.approx(one.tokens_per_s, rel=0.02)
    assert 2.3 * one.tokens_per_s < four.tokens_per_s_streams < 4 * one.tokens_per_s


def test_the_bandwidth_counts_where_the_output_is_on_a_worker() -> None:
    """513 KB for each token at 1 MB/s, instead of 33 KB."""
    slow = replace(HOME, bytes_per_s=1e6)
    head, worker = pool(slow)
    output_on_worker = [
        replace(head, shares=(share(LLAMA_70B, head.shares[0].device, 0, 40),)),
        replace(worker, shares=(share(LLAMA_70B, head.shares[0].device, 40, 41),)),
    ]
    added_ms = forecast(output_on_worker).round_trips_ms - forecast([head, worker]).round_trips_ms
    assert added_ms == pytest.approx(480, rel=0.05)


def test_a_draft_that_is_always_right_yields_all_its_tokens() -> None:
    predicted = forecast(pool(), draft=DRAFT_1B, draft_acceptance=1.0, draft_length=7)
    assert (predicted.draft_acceptance, predicted.draft_length) == (1.0, 7)
    assert predicted.draft_tokens_per_s is not None
    assert 3 * predicted.tokens_per_s < predicted.draft_tokens_per_s < 8 * predicted.tokens_per_s


def test_a_longer_distance_makes_a_longer_draft_the_fastest() -> None:
    lengths = [
        forecast(pool(WorkerPath(PathKind.THROUGH_US, rtt)), draft=DRAFT_1B).draft_length or 0 for rtt in (0.2, 60.0)
    ]
    assert lengths[0] < lengths[1]


def test_a_draft_that_is_never_right_makes_it_slower() -> None:
    predicted = forecast(pool(), draft=DRAFT_1B, draft_acceptance=0.0)
    assert predicted.draft_tokens_per_s is not None
    assert predicted.draft_tokens_per_s < predicted.tokens_per_s


def test_only_the_used_experts_are_read() -> None:
    experts = replace(LLAMA_70B, experts=64, experts_used=8, feed_forward=28672 // 64)
    dense, sparse = forecast(pool()), forecast(pool(), shape=experts)
    assert sparse.compute_ms < 0.4 * dense.compute_ms
    four = forecast(pool(), 4, shape=experts)
    assert four.tokens_per_s_streams < forecast(pool(), 4).tokens_per_s_streams * 4


def test_the_prompt_crosses_the_way_once_in_each_direction() -> None:
    seconds = forecast_prompt_way_s(LLAMA_70B, pool(replace(HOME, bytes_per_s=12.5e6)), tokens=2048)
    assert seconds is not None
    hidden_states = 2 * 4 * 8192 * 2048
    assert seconds > hidden_states / 12.5e6
    assert seconds < hidden_states / 12.5e6 + 15


def test_the_load_sends_the_workers_weights_once() -> None:
    path = replace(HOME, bytes_per_s=12.5e6)
    first, cached = (forecast_load(LLAMA_70B, pool(path), cached=frozenset(nodes)) for nodes in ((), ("worker",)))
    assert first.sent_bytes == pytest.approx(40 * 510 * MB, rel=0.01)
    assert cached.sent_bytes == 0
    assert first.load_s is not None
    assert cached.load_s is not None
    assert first.load_s - cached.load_s == pytest.approx(first.sent_bytes / 12.5e6, rel=0.03)
    assert forecast_load(LLAMA_70B, pool()).load_s is None, "the way's rate is not known"


def test_the_mask_of_a_long_context_goes_to_the_worker_in_each_step() -> None:
    short, long = (estimate_step(LLAMA_70B, tokens=1, filled=filled, has_output=False) for filled in (1, 8000))
    assert long.sent_bytes - short.sent_bytes == 2 * (8192 - 256)


def test_names_of_nvidia_smi_are_found() -> None:
    assert find_bytes_per_s("NVIDIA GeForce RTX 4090") == find_bytes_per_s("GeForce RTX 4090") == 756e9
    laptop = find_bytes_per_s("NVIDIA GeForce RTX 4090 Laptop GPU")
    assert laptop is not None
    assert laptop < 756e9
    assert find_bytes_per_s("NVIDIA H200") == 1.25e12, "one stream does not use all of it"
    assert find_bytes_per_s("AMD EPYC") is None


def test_what_a_host_has_decoded_tells_its_bandwidth() -> None:
    sizes = {"small": 1_000 * MB, "large": 4_000 * MB, "unused": 9_000 * MB}
    assert learn_bytes_per_s(sizes, {"small": 0.05, "large": 0.1, "gone": 0.1}) == 40e9
    assert learn_bytes_per_s(sizes, {"small": None}) is None
