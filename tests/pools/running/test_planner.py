"""Which plan a start takes: without a lost node and without unloading Ollama, where that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.errors import AuthRefused, GPUMeshError, PoolDoesNotFit, PoolProgramMissing
from gpumesh.pool_spec import PoolMember, PoolSpec
from gpumesh.pools.base import DeviceOffer, HostOffer, ModelShape, PathKind, WorkerPath
from gpumesh.pools.hosts.model_files import ModelFile
from gpumesh.pools.hosts.programs import HostPrograms
from gpumesh.pools.running.planner import PoolHosts, check_programs, choose_plan

GIB = 1 << 30
SHAPE = ModelShape(
    architecture="llama",
    name="big",
    file_type="Q4_K_M",
    layer_bytes=(GIB,) * 16,
    input_bytes=GIB // 4,
    output_bytes=GIB // 4,
    kv_elements=(2048,) * 16,
    embedding=4096,
    vocabulary=32000,
    heads=32,
    trained_context=8192,
    parameters=30_000_000_000,
    file_bytes=17 * GIB,
    head_size=128,
    kv_heads=8,
    feed_forward=14336,
)
SPEC = PoolSpec("big", "~/big.gguf", (PoolMember("a"), PoolMember("b"), PoolMember("c")), "a")
NO_ERRORS: dict[str, GPUMeshError] = {}


def gpu(free_gib: float, held_gib: float = 0.0) -> DeviceOffer:
    return DeviceOffer("NVIDIA GeForce RTX 4090", 0, 24 * GIB, int(free_gib * GIB), 7e11, int(held_gib * GIB))


def hosts(*offers: HostOffer, errors: dict[str, GPUMeshError] = NO_ERRORS) -> PoolHosts:
    names = [offer.node for offer in offers]
    programs = {
        name: HostPrograms(name, server="/bin/llama-server", rpc_server="/bin/ggml-rpc-server") for name in names
    }
    paths = {name: WorkerPath(PathKind.THROUGH_US, 1.0, 1e8) for name in names if name != "a"}
    return PoolHosts({}, programs, offers, paths, ModelFile("/big.gguf", 17 * GIB, SHAPE), None, errors)


def offer(node: str, free_gib: float, held_gib: float = 0.0) -> HostOffer:
    return HostOffer(node, (gpu(free_gib, held_gib),))


def members_of(found: PoolHosts, lost: frozenset[str] = frozenset(), spec: PoolSpec = SPEC) -> list[str]:
    plan = choose_plan(spec, found, lost).plan
    return sorted({plan.head.node, *(worker.node for worker in plan.workers)})


def test_a_lost_node_is_left_out_if_the_model_fits_without_it() -> None:
    enough = hosts(offer("a", 12), offer("b", 12), offer("c", 12))
    assert "b" not in members_of(enough, frozenset({"b"}))
    assert "a" in members_of(enough, frozenset({"a"})), "there is no pool without its head"
    needed = hosts(offer("a", 8), offer("b", 8), offer("c", 8))
    assert members_of(needed, frozenset({"b"})) == ["a", "b", "c"]


def test_ollama_is_asked_to_unload_only_where_its_memory_is_needed() -> None:
    allowed = replace(SPEC, unload=True)
    free = hosts(offer("a", 12, 10), offer("b", 12, 10))
    assert choose_plan(allowed, free, frozenset()).unload == ()
    held = hosts(offer("a", 12), offer("b", 2, 20))
    assert choose_plan(allowed, held, frozenset()).unload == ("b",)
    with pytest.raises(PoolDoesNotFit):
        choose_plan(SPEC, held, frozenset())


def test_what_does_not_fit_names_the_members_that_are_away() -> None:
    away = HostOffer("b", problem="it does not answer")
    found = hosts(offer("a", 12), away, errors={"b": AuthRefused("b accepts no key", node="b")})
    with pytest.raises(PoolDoesNotFit, match="b cannot take part: b accepts no key") as caught:
        choose_plan(SPEC, found, frozenset())
    assert caught.value.unreachable == {"b"}
    assert caught.value.hint == "it is tried again when b can be reached"


def test_only_the_hosts_of_the_plan_need_programs() -> None:
    found = hosts(offer("a", 12), offer("b", 12), offer("c", 1))
    plan = choose_plan(SPEC, found, frozenset()).plan
    bare = {**found.programs, "c": HostPrograms("c")}
    check_programs(plan, replace(found, programs=bare))
    with pytest.raises(PoolProgramMissing, match="no ggml-rpc-server on b"):
        check_programs(plan, replace(found, programs={**bare, "b": replace(bare["b"], rpc_server=None)}))
