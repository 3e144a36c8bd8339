"""Which pool is meant, and the pool that `gpumesh pool plan` plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from gpumesh.cli.pool.pool_choice import PlanRequest, choose_pool, name_after, parse_members, yaml_entry
from gpumesh.errors import UsageError
from gpumesh.pool_spec import KvType, PoolMember, PoolSpec
from gpumesh.state import BackendPhase, BackendState, MeshState, NodeState
from gpumesh.topology import Topology
from tests.cli.states import typical
from tests.config import build

NODES = """nodes:
- {name: far, backend: {url: "http://203.0.113.7:11434"}}
- {name: off, ssh: {host: h0}, enabled: false}
- {name: iceland, ssh: {host: h1}}
- {name: vengeance, ssh: {host: h2}}
- {name: local, backend: {url: "http://127.0.0.1:11434"}}
"""
BIG = "- {name: big, model: m, nodes: [iceland, {node: vengeance, memory: 20GiB}], split: [40, 41], context: 8192}\n"
SMALL = "- {name: small, model: ~/m.gguf, nodes: local}\n"


def topology(*pools: str) -> Topology:
    return build.topology(f"{NODES}pools:\n{''.join(pools)}" if pools else NODES)


def mesh_state(*owners: str, up: bool = True, model: str = "llama3.3:70b") -> MeshState:
    """A mesh of the nodes above, of which ``owners`` have the model."""
    sample = typical()
    phase = BackendPhase.UP if up else BackendPhase.DOWN

    def node(name: str) -> NodeState:
        models = (model,) if name in owners else ("other:1b",)
        backend: BackendState = replace(sample.nodes[0].backend, state=phase, models=models)
        return replace(sample.nodes[0], name=name, backend=backend)

    return replace(sample, nodes=tuple(node(spec.name) for spec in topology().nodes))


def planned(request: PlanRequest, *pools: str, state: MeshState | None = None) -> PoolSpec:
    return request.make_spec(topology(*pools), state or mesh_state("vengeance"))


def test_the_name_may_be_left_out_where_there_is_one_pool() -> None:
    pools = topology(BIG, SMALL).pools
    assert choose_pool(pools, "small").name == "small"
    assert choose_pool(pools[:1], None).name == "big"
    with pytest.raises(UsageError, match="several pools") as several:
        choose_pool(pools, None)
    assert several.value.hint == "the pools are: big, small"
    with pytest.raises(UsageError, match="there is no pool 'bgi'"):
        choose_pool(pools, "bgi")
    with pytest.raises(UsageError, match=r"mesh\.yaml has no pools"):
        choose_pool((), None)


def test_a_pool_of_the_file_is_planned_as_it_stands_there() -> None:
    (big,) = topology(BIG).pools
    assert planned(PlanRequest("big"), BIG) == big
    assert planned(PlanRequest(None), BIG) == big
    assert not PlanRequest("big").changes_pool


def test_options_replace_what_the_pool_has() -> None:
    request = PlanRequest("big", parse_members(["vengeance,local=2GiB"]), "local", 16384, 4, KvType.Q8_0, "/draft.gguf")
    assert planned(request, BIG) == PoolSpec(
        name="big",
        model="m",
        members=(PoolMember("vengeance"), PoolMember("local", 2048)),
        head="local",
        context=16384,
        parallel=4,
        split=None,  # it went by other nodes
        kv_type=KvType.Q8_0,
        draft="/draft.gguf",
    )
    assert request.changes_pool
    other_nodes = planned(PlanRequest("big", parse_members(["local"])), BIG)
    assert other_nodes.head == "local", "the pool's own head is none of these nodes"


def test_a_model_is_planned_over_all_nodes_that_can_run_programs() -> None:
    request = PlanRequest("llama3.3:70b", context=8192)
    assert request.member_names(topology()) == ["iceland", "vengeance", "local"]
    spec = planned(request)
    assert spec.name == "llama3.3-70b"
    assert [member.node for member in spec.members] == ["iceland", "vengeance", "local"]
    assert spec.head == "vengeance", "it has the model"
    assert spec.context == 8192
    assert planned(PlanRequest("~/m/Llama 70b.gguf")).name == "Llama-70b"


def test_a_model_that_no_node_has_is_an_error_unless_a_node_has_not_answered() -> None:
    with pytest.raises(UsageError, match="no node has the model 'bgi', and no pool is called so") as wrong:
        planned(PlanRequest("bgi"), BIG)
    assert wrong.value.hint is not None
    assert wrong.value.hint.startswith("the pools are: big; ")
    assert planned(PlanRequest("bgi"), state=mesh_state(up=False)).model == "bgi"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (PlanRequest("m.gguf"), "'m.gguf' is no whole path"),
        (PlanRequest("llama3.3:70b", (PoolMember("icland"),)), "there is no node 'icland'"),
        (PlanRequest("llama3.3:70b", head="far"), "--head far is none of the pool's nodes"),
        (PlanRequest(None), r"mesh\.yaml has no pools"),
    ],
)
def test_what_cannot_be_planned(request_: PlanRequest, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(request_)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a,a", "names a twice"), ("a,", "names no node"), ("a=20", "has no unit"), ("=2GiB", "no node")],
)
def test_what_is_no_list_of_nodes(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_members([text])


def test_the_entry_for_the_file_gives_the_same_pool() -> None:
    spec = planned(
        PlanRequest("~/m: {x}.gguf", parse_members(["vengeance", "local=20GiB"]), kv_type=KvType.Q4_0, draft="d")
    )
    spec = replace(spec, split=(3, 4), llama_cpp_dir="~/a b", unload=True, autostart=True)
    assert topology(f"{yaml_entry(spec)}\n").pools == (spec,)
    assert yaml.safe_load(yaml_entry(spec))[0]["kv_type"] == "q4_0"


@pytest.mark.parametrize(
    ("model", "name"), [("llama3.3:70b", "llama3.3-70b"), ("hf.co/a/b-GGUF:Q4", "b-GGUF-Q4"), ("/m/ß.gguf", "pool")]
)
def test_a_pool_is_named_after_its_model(model: str, name: str) -> None:
    assert name_after(model) == name
