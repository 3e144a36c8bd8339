"""Two machines, or two ways to one?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.audit import Machine, Proof, find_machines, gpu_groups, identifying_marks
from gpumesh.audit.identity import choose_node_to_keep, find_duplicates, hostname_matches, store_fingerprint
from gpumesh.state import (
    BackendPhase,
    BackendState,
    GpuState,
    ModelInfo,
    NodeState,
    RouteState,
    TunnelPhase,
    TunnelState,
)
from gpumesh.topology import AddressCommand, NodeSpec, SshSpec
from tests.audit.build import GPU, KEY, MODEL, OTHER, backend, direct, spec, state, without_gpus


def node(
    name: str,
    *gpus: GpuState,
    keys: tuple[str, ...] = (),
    stored: str | None = None,
    port: int | None = 80,
    **more: Any,
) -> NodeState:
    """``stored``: when its model was stored; ``port``: its server's, as its own host knows it, ``None`` without SSH."""
    url = f"http://127.0.0.1:4{name}"
    tunnel = TunnelState("direct" if port is None else "sshtunnel", TunnelPhase.UP, host_keys=keys)
    catalog = () if stored is None else (replace(MODEL, modified_at=stored),)
    routes = () if port is None else (RouteState(f"http://127.0.0.1:{port}", url, "sshtunnel"),)
    server = BackendState("ollama", BackendPhase.UP, url=url, catalog=catalog)
    return replace(state(name, tunnel=tunnel, backend=server, routes=routes, gpus=gpus or None), **more)


def machines_of(*nodes: NodeState) -> list[tuple[str, ...]]:
    return [machine.nodes for machine in find_machines(nodes)]


FINE = "2026-08-01T12:00:00.123456789Z"
LATER = "2026-08-02T12:00:00.987654321Z"


def test_nodes_without_a_common_mark_are_two_machines() -> None:
    nodes = (node("1", GPU, keys=("a",), stored=FINE), node("2", OTHER, keys=("b",), stored=LATER), node("3"))
    assert find_machines(nodes) == (Machine(("1",), (GPU,)), Machine(("2",), (OTHER,)), Machine(("3",), ()))
    assert gpu_groups(nodes) == {"1": "1", "2": "2", "3": "3"}


def test_a_common_gpu_is_a_certain_proof() -> None:
    (machine,) = find_machines([node("1", GPU), node("2", GPU, port=None)])
    assert (machine.nodes, machine.proof, machine.shared_mark, machine.certain) == (
        ("1", "2"),
        Proof.GPU,
        GPU.uuid,
        True,
    )
    assert machine.gpus == (GPU,), "counted once"


def test_a_common_key_is_a_likely_proof() -> None:
    (machine,) = find_machines([node("1", keys=("x", KEY)), node("2", GPU, keys=(KEY,))])
    assert (machine.proof, machine.shared_mark, machine.certain) == (Proof.HOST_KEY, KEY, False)


def test_a_common_store_is_a_likely_proof() -> None:
    (machine,) = find_machines([node("1", stored=FINE, port=None), node("2", GPU, stored=FINE)])
    assert (machine.proof, machine.certain) == (Proof.STORE, False)


def test_different_gpus_outweigh_a_common_key_and_store() -> None:
    """Containers of one image have one host key, a network share one store: their GPUs tell them apart."""
    assert machines_of(node("1", GPU, keys=(KEY,), stored=FINE), node("2", OTHER, keys=(KEY,), stored=FINE)) == [
        ("1",),
        ("2",),
    ]


def test_the_proof_is_the_weakest_link() -> None:
    (machine,) = find_machines([node("1", GPU), node("2", GPU, keys=(KEY,)), node("3", keys=(KEY,))])
    assert (machine.nodes, machine.proof) == (("1", "2", "3"), Proof.HOST_KEY)
    (machine,) = find_machines([node("1", stored=FINE), node("2", keys=(KEY,), stored=FINE), node("3", keys=(KEY,))])
    assert (machine.nodes, machine.proof) == (("1", "2", "3"), Proof.STORE)


def test_a_group_is_named_after_its_first_node() -> None:
    nodes = [node("3", OTHER), node("2", GPU), node("1", OTHER, GPU)]
    assert gpu_groups(nodes) == {"3": "3", "2": "3", "1": "3"}
    assert machines_of(*nodes) == [("3", "2", "1")]


@pytest.mark.parametrize("uuid", ["unknown-host-00000000:01:00.0", "GPU-", "GPU-0000", "", "gpu-8f2c1d5e-3b6a"])
def test_a_made_up_uuid_is_no_mark(uuid: str) -> None:
    gpu = replace(GPU, uuid=uuid)
    assert machines_of(node("1", gpu), node("2", gpu)) == [("1",), ("2",)]


# -- several servers on one machine ----------------------------------------------------------------------------------


def test_two_servers_of_a_machine_with_two_gpus_are_two_machines() -> None:
    """Each may well be pinned to a GPU of its own: as one they would get half of the work that they can do."""
    assert machines_of(node("1", GPU, OTHER, port=11434), node("2", GPU, OTHER, port=11435)) == [("1",), ("2",)]
    assert machines_of(node("1", GPU, OTHER, port=80), node("2", GPU, OTHER, port=80)) == [("1", "2")]


def test_two_servers_of_a_machine_with_one_gpu_are_one_machine() -> None:
    """They share it: what runs on one slows the other."""
    assert machines_of(node("1", GPU, port=11434), node("2", GPU, port=11435)) == [("1", "2")]
    assert machines_of(node("1", GPU, keys=(KEY,), port=1), node("2", keys=(KEY,), port=2)) == [("1", "2")]


def test_two_servers_of_a_machine_with_unknown_gpus_are_two_machines() -> None:
    assert machines_of(node("1", keys=(KEY,), port=1), node("2", keys=(KEY,), port=2)) == [("1",), ("2",)]
    assert machines_of(node("1", keys=(KEY,)), node("2", keys=(KEY,))) == [("1", "2")]


def test_the_ports_of_direct_nodes_distinguish_no_servers() -> None:
    """``ssh -L 11435:localhost:11434``"""
    assert machines_of(node("1", stored=FINE, port=None), node("2", stored=FINE, port=11434)) == [("1", "2")]


# -- stores ----------------------------------------------------------------------------------------------------------


def model(name: str, stored: str | None) -> ModelInfo:
    return ModelInfo(name, modified_at=stored)


@pytest.mark.parametrize(
    "catalog",
    [
        (),
        (model("a", None),),
        (model("a", FINE), model("b", None)),
        (model("a", "2026-08-01T12:00:00Z"),),
        (model("a", "2026-08-01T12:00:00.123Z"), model("b", "2026-08-01T12:00:00Z")),
    ],
)
def test_a_store_without_nanoseconds_has_no_fingerprint(catalog: tuple[ModelInfo, ...]) -> None:
    assert store_fingerprint(catalog) is None


def test_the_fingerprint_covers_all_models_of_a_store() -> None:
    first = store_fingerprint((model("a", FINE), model("b", LATER)))
    assert first is not None
    assert store_fingerprint((model("b", LATER), model("a", FINE))) == first
    others = [(model("a", FINE),), (model("a", FINE), model("b", FINE)), (model("a", FINE), model("c", LATER))]
    assert first not in {store_fingerprint(other) for other in others}
    assert store_fingerprint((model("a\ud800", FINE),)) is not None


# -- marks -----------------------------------------------------------------------------------------------------------


def test_marks_change_with_what_distinguishes_machines() -> None:
    plain = node("1", GPU, keys=(KEY,), stored=FINE)
    assert identifying_marks(plain) == identifying_marks(replace(plain, reason="busy", load=state().load))
    others = [
        node("1", GPU, OTHER, keys=(KEY,), stored=FINE),
        node("1", GPU, keys=("other",), stored=FINE),
        node("1", GPU, keys=(KEY,), stored=LATER),
        node("1", GPU, keys=(KEY,), stored=FINE, port=81),
        node("1", keys=(KEY,), stored=FINE),
        replace(plain, tunnel=replace(plain.tunnel, state=TunnelPhase.BACKOFF)),
    ]
    assert len({identifying_marks(other) for other in (plain, *others)}) == len(others) + 1


NODES = st.lists(
    st.builds(
        node,
        st.just("x"),
        st.sampled_from((GPU, OTHER)),
        keys=st.lists(st.sampled_from("ab"), max_size=2, unique=True).map(tuple),
        stored=st.sampled_from((None, FINE, LATER)),
        port=st.sampled_from((None, 1, 2)),
    )
    | st.builds(node, st.just("x"), keys=st.sampled_from(((), ("a",))), stored=st.sampled_from((None, FINE))),
    max_size=6,
).map(lambda nodes: [replace(node, name=f"n{number}") for number, node in enumerate(nodes)])


@given(NODES)
def test_each_node_is_in_one_machine_and_groups_agree(nodes: list[NodeState]) -> None:
    machines = find_machines(nodes)
    names = [name for machine in machines for name in machine.nodes]
    assert sorted(names) == sorted(node.name for node in nodes)
    assert [machine.nodes[0] for machine in machines] == sorted(
        (machine.nodes[0] for machine in machines), key=[node.name for node in nodes].index
    )
    for machine in machines:
        assert (machine.proof is None) == (len(machine.nodes) == 1)
        assert {gpu_groups(nodes)[name] for name in machine.nodes} == {machine.nodes[0]}


# -- by mesh.yaml alone ----------------------------------------------------------------------------------------------


def duplicates_of(*specs: NodeSpec) -> list[list[str]]:
    return list(find_duplicates(specs))


def ssh_spec(name: str, host: str = "203.0.113.7", **changes: Any) -> NodeSpec:
    return spec(name, ssh=replace(SshSpec(host, 13323), **changes))


def test_duplicates_have_the_same_address_user_and_candidates() -> None:
    assert duplicates_of(ssh_spec("a"), ssh_spec("b"), direct("c"), direct("d")) == [["a", "b"], ["c", "d"]]
    assert duplicates_of(ssh_spec("a"), ssh_spec("b", "EXAMPLE.org"), ssh_spec("c", "example.org")) == [["b", "c"]]
    assert (
        duplicates_of(
            ssh_spec("a"), ssh_spec("b", port=22), ssh_spec("c", user="ada"), ssh_spec("d", proxy_jump=("j",))
        )
        == []
    )
    assert duplicates_of(ssh_spec("a"), replace(ssh_spec("b"), backend=direct().backend)) == []
    assert (
        duplicates_of(
            direct("a"), direct("b", "http://127.0.0.1:1"), direct("c", "http://127.0.0.1:11434", "http://x:1")
        )
        == []
    )


def test_addresses_from_commands_are_the_same_only_by_the_same_command() -> None:
    first, other = AddressCommand(("pod", "1")), AddressCommand(("pod", "2"))
    assert duplicates_of(ssh_spec("a", "", address_from=first), ssh_spec("b", "", address_from=other)) == []
    assert duplicates_of(ssh_spec("a", "", address_from=first), ssh_spec("b", "", address_from=first)) == [["a", "b"]]
    assert duplicates_of(ssh_spec("a", ""), ssh_spec("b", "")) == [], "hosts of which nothing is known"


def test_the_node_to_keep() -> None:
    down = replace(state(), backend=backend(state=BackendPhase.DOWN))
    specs = {"a": spec("a"), "b": spec("b"), "c": direct("c")}

    def keep(**states: NodeState) -> str:
        return choose_node_to_keep(tuple(states), specs, states)

    assert keep(a=state(), b=state()) == "a"
    assert keep(a=state(), c=state()) == "c", "no tunnel between"
    assert keep(a=state(), c=without_gpus(state())) == "a", "it sees the GPU"
    assert keep(a=down, c=without_gpus(state())) == "c", "it serves"


@pytest.mark.parametrize(
    ("first", "other", "same"),
    [
        ("box", "box", True),
        ("box", "BOX ", True),
        ("box", "box.example.org", True),
        ("box.example.org", "box", True),
        ("box.a", "box.b", False),
        ("box", "box2", False),
        ("box", "other.box", False),
    ],
)
def test_hostname_matches(first: str, other: str, same: bool) -> None:
    assert hostname_matches(first, other) is same
