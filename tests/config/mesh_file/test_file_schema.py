from __future__ import annotations

from typing import Any

from gpumesh.config.mesh_file.file_schema import MeshFile, schema


def test_every_section_refuses_keys_that_it_does_not_know() -> None:
    document = schema()
    for name, section in {"MeshFile": document, **document["$defs"]}.items():
        if section.get("type") == "object" and "properties" in section:
            assert section["additionalProperties"] is False, name


def test_the_file_is_read_as_text_and_checked_by_its_keys() -> None:
    """``12e5`` is a name under `name`, and no number under `port`."""
    values: dict[str, Any] = {
        "name": "12e5",
        "nodes": [{"name": "no", "ssh": {"host": "h", "port": "22"}, "labels": {"on": "yes"}, "weight": "0.5"}],
    }
    file = MeshFile.model_validate(values)
    assert file.name == "12e5"
    assert file.nodes is not None
    (node,) = file.nodes
    assert (node.name, node.weight, dict(node.labels or {})) == ("no", 0.5, {"on": "yes"})
    assert node.ssh is not None
    assert node.ssh.port == 22


def test_what_is_not_said_is_none() -> None:
    file = MeshFile.model_validate({"nodes": [{"name": "a"}]})
    assert file.gateway is None
    assert file.nodes is not None
    assert file.nodes[0].enabled is None
