from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gpumesh import config
from gpumesh.topology import AddressCommand, BackendSpec, NodeSpec, RedisSpec, SshSpec, Target, Topology
from tests.config.build import HOME

ROOT = Path(__file__).parents[2]


def test_what_is_in_effect_can_be_read_back(tmp_path: Path) -> None:
    mesh = Topology(
        "home",
        (
            NodeSpec("a", BackendSpec(targets=(Target("h", 80, "https", "/x"),)), labels={"on": "no", "${X}": "${Y}"}),
            NodeSpec(
                "b",
                BackendSpec(),
                SshSpec("", known_hosts=HOME / "k", address_from=AddressCommand(("/where", "a b", "${C}"))),
                weight=2.5,
                eur_per_hour=0.34,
                enabled=False,
            ),
        ),
        source=tmp_path / "mesh.yaml",
    )
    mesh = Topology(
        mesh.name, (NodeSpec("a", mesh.nodes[0].backend, labels={"on": "no"}), mesh.nodes[1]), source=mesh.source
    )
    text = config.dump_effective(mesh)
    assert config.parse(text, file="x", env={}, home=HOME, source=mesh.source) == mesh


def test_secrets_that_got_in_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_API_KEY", "hunter2-hunter2")
    spec = SshSpec("h", address_from=AddressCommand(("curl", "-H", "Bearer hunter2-hunter2")))
    mesh = Topology("m", (NodeSpec("a", BackendSpec(), spec),), redis=RedisSpec("redis://:hunter3@h/0"))
    text = config.dump_effective(mesh)
    assert "hunter" not in text
    assert text.count("********") == 2


@cache
def schema_validator() -> jsonschema.Draft202012Validator:
    """Made once: ``jsonschema.validate`` would check the schema itself each time, which takes longer."""
    schema = config.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schema_takes_every_mesh_yaml_that_ships() -> None:
    examples = [path for path in (ROOT / "examples").glob("*.yaml") if path.name != "fleet.yaml"]  # for the simulator
    for path in [ROOT / "mesh.yaml", *examples]:
        schema_validator().validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"nodes": [{}]},
        {"nodes": [{"name": "a b"}]},
        {"nodes": [{"name": "a", "ssh": {"port": 99999}}]},
        {"nodes": [{"name": "a", "ssh": {"connect_timeout": 5}}]},
        {"nodes": [{"name": "a", "ssh": {"transport": "telnet"}}]},
        {"nodes": [{"name": "a", "nope": 1}]},
    ],
)
def test_the_schema_refuses(document: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        schema_validator().validate(document)


def sections() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Section, key and schema of every key that mesh.yaml may have."""
    schema = config.schema()
    for name, section in [*schema["$defs"].items(), ("MeshFile", schema)]:
        for key, value in section.get("properties", {}).items():
            yield name, key, value


def test_every_key_is_described_in_the_schema() -> None:
    for name, key, value in sections():
        if name not in ("Node", "NodeDefaults", "MeshFile"):
            assert "description" in value or "$ref" in value or "allOf" in value, f"{name}.{key}"


def test_every_key_is_described_in_the_documentation() -> None:
    """The page that mesh.yaml and the error messages point to."""
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert [f"{name}.{key}" for name, key, _ in sections() if f"`{key}`" not in written] == []
