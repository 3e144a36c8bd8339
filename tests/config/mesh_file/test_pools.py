"""The section ``pools``, read from text as a person writes it."""

from __future__ import annotations

import jsonschema
import pytest
import yaml

from gpumesh import config
from gpumesh.config.comparison import compare_topologies
from gpumesh.config.live_changes import ReloadReport
from gpumesh.pool_spec import KvType, PoolMember, PoolSpec, is_model_path
from tests.config.build import HOME, problem, problems, topology

NODES = """nodes:
- {name: vengeance, ssh: {host: h1}}
- {name: iceland, ssh: {host: h2}}
- {name: local, backend: {url: "http://127.0.0.1:11434"}}
- {name: remote, backend: {url: "http://203.0.113.7:11434"}}
"""


def text(*pools: str) -> str:
    return f"{NODES}pools:\n" + "".join(f"- {{{pool}}}\n" for pool in pools)


def pool(entries: str) -> PoolSpec:
    (spec,) = topology(text(entries)).pools
    return spec


def test_all_keys_of_a_pool() -> None:
    assert pool(
        "name: big, model: ~/m/llama-70b.gguf, nodes: [{node: vengeance, memory: 20GiB}, iceland], head: iceland, "
        "context: 16384, parallel: 4, kv_type: q8_0, split: [40, 41], draft: /m/llama-1b.gguf, "
        "llama_cpp_dir: ~/llama.cpp/build/bin, unload: true, autostart: true"
    ) == PoolSpec(
        name="big",
        model="~/m/llama-70b.gguf",
        members=(PoolMember("vengeance", 20480), PoolMember("iceland")),
        head="iceland",
        context=16384,
        parallel=4,
        split=(40, 41),
        draft="/m/llama-1b.gguf",
        kv_type=KvType.Q8_0,
        llama_cpp_dir="~/llama.cpp/build/bin",
        unload=True,
        autostart=True,
    )


def test_what_is_not_given_has_its_default_and_the_first_node_is_the_head() -> None:
    assert pool("name: big, model: 'llama3.3:70b', nodes: [vengeance, local]") == PoolSpec(
        "big", "llama3.3:70b", (PoolMember("vengeance"), PoolMember("local")), "vengeance"
    )
    assert pool("name: big, model: m, nodes: local").members == (PoolMember("local"),)


@pytest.mark.parametrize(
    ("size", "mib"),
    [("20GiB", 20480), ("20G", 20480), ("20 gib", 20480), ("1.5GiB", 1536), ("512MiB", 512), ("20GB", 19073)],
)
def test_a_size_has_a_unit(size: str, mib: int) -> None:
    assert pool(f"name: big, model: m, nodes: [{{node: local, memory: {size}}}]").members == (PoolMember("local", mib),)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("name: big, model: m, nodes: [icland]", ".nodes[0]: there is no node 'icland'; did you mean iceland?"),
        (
            "name: big, model: m, nodes: [local, {node: icland}]",
            ".nodes[1].node: there is no node 'icland'; did you mean iceland?",
        ),
        ("name: big, model: m, nodes: [local, local]", ".nodes[1]: 'local' stands here already"),
        ("name: big, model: m, nodes: []", ".nodes: names no node: a pool needs one at least"),
        ("name: big, model: m", ".nodes: is missing"),
        ("name: big, nodes: [local]", ".model: is missing"),
        ("name: local, model: m, nodes: [local]", ".name: 'local' is the name of a node: a pool needs one of its own"),
        (
            "name: big, model: m, nodes: [local], head: iceland",
            ".head: 'iceland' is none of the pool's nodes, and the head is one of them: add it to `nodes`",
        ),
        ("name: big, model: m, nodes: [local], head: locl", ".head: there is no node 'locl'; did you mean local?"),
        (
            "name: big, model: m, nodes: [local, iceland], split: [3]",
            ".split: has 1 numbers, and the pool has 2: one number of layers for each of `nodes`",
        ),
        ("name: big, model: m, nodes: [local], split: [0]", ".split: gives no node a layer"),
        (
            "name: big, model: m, nodes: [local, remote]",
            ".nodes[1]: 'remote' is known by its URL alone, and a pool starts programs on its hosts: give the node an "
            "`ssh`",
        ),
        (
            "name: big, model: m, nodes: [{node: local, memory: 20}]",
            ".nodes[0].memory: '20' has no unit: write 20GiB, or 512MiB",
        ),
        (
            "name: big, model: m, nodes: [{node: local, memory: much}]",
            ".nodes[0].memory: 'much' is not a size: write 20GiB or 512MiB",
        ),
        (
            "name: big, model: m, nodes: [{node: local, memory: 0GiB}]",
            ".nodes[0].memory: '0GiB' is not between 1MiB and 1048576GiB",
        ),
        (
            "name: big, model: models/m.gguf, nodes: [local]",
            ".model: 'models/m.gguf' is no whole path: write it from / or from ~/, as it is on the host",
        ),
        (
            "name: big, model: m, nodes: [local], llama_cpp_dir: bin",
            ".llama_cpp_dir: 'bin' is no whole path: write it from / or from ~/, as it is on the host",
        ),
        (
            "name: big, model: m, nodes: [local], kv_type: q8",
            ".kv_type: 'q8' is not one of f16, q8_0, q4_0; did you mean q8_0?",
        ),
        (
            "name: big, model: m, nodes: [local], context: 4k",
            ".context: '4k' is not a whole number",
        ),
        ("name: big, model: m, nodes: [local], contxt: 1", ".contxt: unknown key 'contxt'; did you mean context?"),
        ("name: big, model: m, nodes: [local], num_ctx: 1", ".num_ctx: unknown key 'num_ctx'; did you mean context?"),
        (
            "name: big, model: m, nodes: [{node: local, weight: 1}]",
            ".nodes[0].weight: unknown key 'weight'; weight belongs under a node",
        ),
        ("name: big, model: m, nodes: [[local]]", ".nodes[0]: keys with values are expected here, not a list"),
    ],
)
def test_what_is_wrong_with_a_pool(entries: str, expected: str) -> None:
    line = problem(text(entries))
    assert line.startswith("mesh.yaml:7:")
    assert line.partition("pools[0]")[2] == expected


def test_all_problems_are_reported_at_once() -> None:
    reported = problems(text("name: big, nodes: [icland], hed: local", "name: big, model: m, nodes: [local], head: x"))
    assert [line.split(" ")[1] for line in reported] == [
        "pools[0].model:",
        "pools[0].nodes[0]:",
        "pools[0].hed:",
        "pools[1].name:",
        "pools[1].head:",
    ]


def test_name_as_in_nodes_is_understood() -> None:
    found = problems(text("name: big, model: m, nodes: [{name: local, memory: 20GiB}]"))
    assert any(line.endswith(".nodes[0].name: unknown key 'name'; did you mean node?") for line in found), found


def test_pools_are_a_list() -> None:
    assert problem(f"{NODES}pools:\n  big: {{model: m, nodes: [local]}}\n").endswith(
        "pools: pools are a list: write `- name: big`"
    )


def test_a_pool_is_a_node_for_the_rules_of_models_and_keys() -> None:
    more = "models: {m: {nodes: [big, local], prefer: big}}\ngateway: {keys: [{name: k, env: K, nodes: big}]}\n"
    parsed = topology(text("name: big, model: m, nodes: [local]") + more)
    assert parsed.models[0].prefer == ("big",)
    assert parsed.gateway.keys[0].nodes == ("big",)


@pytest.mark.parametrize(
    ("model", "is_path", "served_name"),
    [
        ("llama3.3:70b", False, "llama3.3:70b"),
        ("/m/llama-70b.gguf", True, "llama-70b"),
        ("~/m/blob", True, "blob"),
        ("hf.co/a/b-GGUF:b-Q4_K_M.gguf", False, "hf.co/a/b-GGUF:b-Q4_K_M.gguf"),  # a tag of Ollama's
    ],
)
def test_a_path_and_a_name_are_told_apart(model: str, is_path: bool, served_name: str) -> None:
    spec = pool(f"name: big, model: '{model}', nodes: [local]")
    assert (is_model_path(model), spec.served_name) == (is_path, served_name)


def test_what_is_in_effect_can_be_read_back_and_fits_the_schema() -> None:
    mesh = topology(
        text(
            "name: big, model: m, nodes: [{node: vengeance, memory: 20GB}, iceland], split: [1, 2], draft: d",
            "name: small, model: /m.gguf, nodes: local, kv_type: q4_0",
        )
    )
    shown = config.dump_effective(mesh)
    assert config.parse(shown, file="mesh.yaml", env={}, home=HOME).pools == mesh.pools
    jsonschema.validate(yaml.safe_load(shown), config.schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(
            yaml.safe_load(text("name: big, model: m, nodes: [{node: local, memory: 20}]")), config.schema()
        )


def test_a_changed_file_says_what_is_another_of_each_pool() -> None:
    before = topology(text("name: big, model: m, nodes: [local]", "name: gone, model: m, nodes: [local]"))
    after = topology(
        text(
            "name: big, model: m, nodes: [local, {node: iceland, memory: 20GiB}], context: 8192",
            "name: new, model: m, nodes: [local]",
        )
    )
    differences = compare_topologies(before, after)
    assert ReloadReport(differences).lines() == [
        "pool new: added; `gpumesh pool up new` starts it",
        "pool gone: removed",
        "pool big: nodes local -> local, iceland (20GiB), context 4096 -> 8192; takes effect at its next start",
    ]
    assert str(differences) == (
        "the pool new is new; the pool gone is not in mesh.yaml any more; the pool big has another nodes and context"
    )
    assert not differences.change_routes
    assert not differences.change_expectations_only
    assert not compare_topologies(after, after)
