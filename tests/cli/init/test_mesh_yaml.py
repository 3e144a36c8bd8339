"""The text of mesh.yaml that init writes, read back by the configuration's own parser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from gpumesh import config
from gpumesh.cli.init.mesh_yaml import default_model, mesh_yaml_lines
from gpumesh.cli.init.node_drafts import Draft, summarize_draft
from gpumesh.state import ModelInfo
from gpumesh.topology import BackendKind, Target, Topology
from tests.cli.states import down, gpu, healthy

HOME = Path("/home/me")


def read_back(made: list[Draft]) -> Topology:
    return config.parse("\n".join(mesh_yaml_lines(made)), file="mesh.yaml", env={"LOGNAME": "me"}, home=HOME)


def found(draft: Draft, **changes: object) -> Draft:
    return replace(draft, state=replace(healthy(draft.name), **changes), ports=(11434,))  # type: ignore[arg-type]


def test_an_unprobed_draft_lists_all_urls() -> None:
    node = read_back([Draft("a", {"host": "h", "port": 22, "user": "root"}, ports=(1, 2))]).nodes[0]
    assert node.backend.targets == (Target("127.0.0.1", 1), Target("127.0.0.1", 2))


def test_what_the_probe_found_becomes_expected() -> None:
    remote = found(Draft("a", {"host": "h", "port": 22, "user": "root"}), gpus=(gpu(0), gpu(1)))
    local = replace(found(Draft("b", None)), ports=(8000,))
    mesh = read_back([remote, local])
    expect = mesh.nodes[0].expect
    assert (expect.hostname, expect.gpus, expect.gpu, expect.vram_mib) == (
        "af4a84245990",
        2,
        "NVIDIA GeForce RTX 4090",
        24564,
    )
    assert expect.models == ("qwen2.5:7b", "nomic-embed-text:latest")
    assert mesh.nodes[0].backend.targets == (Target("127.0.0.1", 11434),)
    assert mesh.nodes[1].ssh is None
    assert (mesh.nodes[1].backend.kind, mesh.nodes[1].backend.targets) == (
        BackendKind.AUTO,
        (Target("127.0.0.1", 8000),),
    )
    assert mesh.gateway.default_model == "qwen2.5:7b"


def test_gpus_that_differ_are_only_counted() -> None:
    expect = read_back([found(Draft("a", None), gpus=(gpu(0), gpu(1, name="NVIDIA H100 80GB HBM3")))]).nodes[0].expect
    assert (expect.gpus, expect.gpu) == (2, None)


def test_an_unreachable_host_is_written_with_the_reason() -> None:
    draft = replace(Draft("x", {"host": "h", "port": 22, "user": "root"}), state=down("x", "it refuses\nthe key"))
    text = "\n".join(mesh_yaml_lines([draft]))
    assert "    # not seen when this was written: it refuses the key\n" in text
    assert "expect" not in text
    assert read_back([draft]).nodes[0].name == "x"
    assert summarize_draft(draft) == "x: it refuses the key"


@pytest.mark.parametrize(
    "said",
    [
        "no",
        "12e5",
        "a: b",
        "a #b",
        "x]",
        "${HOME}",
        '"',
        "\x1b[31m\nnodes: []",
        "~",
        "-",
        "1.2.3.4",
        "qwen2.5:7b",
        "http://h:1/",
        "a:",
        "{}",
        "*a",
        "!x",
        "'",
        "\\",
        "東京",
    ],
)
def test_text_from_a_host_is_quoted(said: str) -> None:
    draft = found(Draft("a", None), host=replace(healthy("a").host, hostname="h"))
    assert draft.state is not None
    backend = replace(draft.state.backend, models=(said,), catalog=())
    draft = replace(draft, state=replace(draft.state, backend=backend))
    text = "\n".join(mesh_yaml_lines([draft]))
    (model,) = read_back([draft]).nodes[0].expect.models
    assert model == said.replace("\x1b[31m\n", "")
    assert yaml.safe_load(text)["nodes"][0]["expect"]["models"] == [model.replace("${", "$${")]


def test_the_default_is_the_chat_model_on_most_nodes() -> None:
    def with_models(name: str, *models: str) -> Draft:
        draft = found(Draft(name, None))
        assert draft.state is not None
        catalog = tuple(ModelInfo(model, family="bert" if model == "odd:1" else "llama") for model in models)
        return replace(
            draft, state=replace(draft.state, backend=replace(draft.state.backend, models=models, catalog=catalog))
        )

    made = [with_models("a", "z:1", "b:1", "odd:1"), with_models("b", "z:1", "odd:1", "nomic-embed-text:latest")]
    assert default_model(made) == "z:1"
    assert default_model([with_models("a", "z:1", "b:1")]) == "b:1"
    assert default_model([with_models("a", "odd:1")]) is None
    assert default_model([Draft("a", None)]) is None
