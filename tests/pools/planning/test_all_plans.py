"""What holds for the plan of any model over any hosts."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gpumesh.pool_spec import KvType, PoolSpec
from gpumesh.pools.base import DeviceOffer, HostOffer, ModelShape, PoolPlan, WorkerPath
from gpumesh.pools.planning.buffers.graph_memory import ALIGNMENT, Operation, graph_bytes
from gpumesh.pools.planning.plan import plan_pool
from tests.pools.planning.pools import cpu, gpu, host, paths, pool, small_model

RATES = st.sampled_from([None, 40e9, 300e9, 1008e9])


@st.composite
def models(draw: st.DrawFn) -> ModelShape:
    layers = draw(st.integers(1, 40))
    windows = draw(st.sampled_from([(), tuple(layer % 2 == 0 for layer in range(layers))]))
    return small_model(
        layers,
        layer_bytes=tuple(draw(st.lists(st.integers(1, 2**30), min_size=layers, max_size=layers))),
        kv_elements=tuple(draw(st.lists(st.sampled_from([0, 64, 2048]), min_size=layers, max_size=layers))),
        output_bytes=draw(st.integers(0, 2**30)),
        window=1024 if windows else None,
        window_layers=windows,
        experts=draw(st.sampled_from([0, 8])),
        experts_used=2,
    )


@st.composite
def offers_of(draw: st.DrawFn, node: str) -> HostOffer:
    if draw(st.integers(0, 9)) == 0:
        return HostOffer(node, problem="it is away")
    devices: list[DeviceOffer] = [
        gpu(draw(st.integers(0, 24000)), index=index, bytes_per_s=draw(RATES))
        for index in range(draw(st.integers(0, 3)))
    ]
    limit = draw(st.sampled_from([None, 1000, 20000]))
    return host(node, *(devices or [cpu(draw(st.integers(0, 30000)), draw(RATES))]), limit_mib=limit)


@st.composite
def pools(draw: st.DrawFn) -> tuple[PoolSpec, list[HostOffer], dict[str, WorkerPath]]:
    nodes = ["a", "b", "c", "d"][: draw(st.integers(1, 4))]
    spec = pool(
        *nodes,
        context=draw(st.sampled_from([100, 4096, 50000])),
        parallel=draw(st.integers(1, 8)),
        kv_type=draw(st.sampled_from([KvType.F16, KvType.F16, KvType.Q8_0])),
    )
    rtts = {node: draw(st.sampled_from([None, 0.2, 40.0])) for node in nodes[1:]}
    return spec, [draw(offers_of(node)) for node in nodes], paths(**rtts)


@settings(max_examples=60)
@given(models(), pools())
def test_every_plan_is_whole_or_says_what_is_missing(
    shape: ModelShape, given_pool: tuple[PoolSpec, list[HostOffer], dict[str, WorkerPath]]
) -> None:
    spec, offers, ways = given_pool
    plan = plan_pool(spec, shape, offers, ways)
    assert {member.node for member in plan.members} == {member.node for member in spec.members}
    shares = [share for _, share in plan.used_shares]
    assert all(share.needed_bytes <= share.offered_bytes for share in shares)
    if not plan.fits:
        assert all(problem.endswith((".", "head")) for problem in plan.problems)
        return
    check_whole(plan)
    assert sum(share.kv_bytes for share in shares) >= 0
    inputs = shape.input_bytes if any(share.device.index is None for share in plan.head.shares) else 0
    weights = sum(share.weights_bytes for member in plan.members for share in member.shares)
    assert weights == sum(shape.layer_bytes) + shape.output_bytes + inputs


def check_whole(plan: PoolPlan) -> None:
    """Each layer is on one device, in llama.cpp's order: the head's CPU, the workers, the head's GPUs."""
    at = 0
    for _, share in plan.used_shares:
        assert share.first_layer == at
        at += share.layers
    assert at == plan.shape.layers + 1
    places = [
        1 if not member.is_head else 2 if share.device.index is not None else 0 for member, share in plan.used_shares
    ]
    assert places == sorted(places)


@st.composite
def graphs(draw: st.DrawFn) -> list[Operation]:
    operations: list[Operation] = []
    for number in range(draw(st.integers(1, 30))):
        sources = draw(st.lists(st.integers(0, number - 1), max_size=3)) if number else []
        operations.append(Operation(draw(st.integers(0, 5)) * 1000, tuple(set(sources)), draw(st.booleans())))
    return operations


@given(graphs())
def test_a_graph_needs_what_is_alive_at_once_and_at_most_the_sum(operations: list[Operation]) -> None:
    def padded(operation: Operation) -> int:
        return -(-operation.bytes // ALIGNMENT) * ALIGNMENT

    needed = graph_bytes(operations)
    assert max(map(padded, operations)) <= needed <= sum(map(padded, operations))
