from __future__ import annotations

from typing import Any

from gpumesh.config.mesh_file.file_schema import MeshFile
from gpumesh.config.mesh_file.value_types import SectionOf, ValueProblem


def read(values: dict[str, Any]) -> MeshFile:
    problems: list[ValueProblem] = []
    file = SectionOf(MeshFile).read(values, (), problems)
    assert problems == []
    assert file is not None
    return file


def test_the_file_is_read_as_text_and_checked_by_its_keys() -> None:
    """``12e5`` is a name under `name`, and no number under `port`."""
    values: dict[str, Any] = {
        "name": "12e5",
        "nodes": [{"name": "no", "ssh": {"host": "h", "port": "22"}, "labels": {"on": "yes"}, "weight": "0.5"}],
    }
    file = read(values)
    assert file.name == "12e5"
    (node,) = file.nodes
    assert (node.name, node.weight, dict(node.labels or {})) == ("no", 0.5, {"on": "yes"})
    assert node.ssh is not None
    assert node.ssh.port == 22


def test_what_is_not_said_is_none() -> None:
    file = read({"nodes": [{"name": "a"}]})
    assert file.gateway is None
    assert file.nodes[0].enabled is None
