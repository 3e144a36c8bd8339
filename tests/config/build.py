"""What the tests of this room share: parsing text with given surroundings, and its problems as lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gpumesh import config
from gpumesh.errors import ConfigError
from gpumesh.topology import NodeSpec, SshSpec, Topology

HOME = Path("/home/ada")
DIRECT = "nodes:\n- name: local\n  backend: {url: http://127.0.0.1:11434}\n"


def topology(text: str, *, env: Mapping[str, str] | None = None, **more: Any) -> Topology:
    return config.parse(text, file="mesh.yaml", env=env if env is not None else {"LOGNAME": "ada"}, home=HOME, **more)


def node(text: str, **more: Any) -> NodeSpec:
    """The only node of a mesh, from the YAML of its list item."""
    (only,) = topology(f"nodes:\n- {text}\n", **more).nodes
    return only


def ssh(text: str, **more: Any) -> SshSpec:
    spec = node(f"{{name: a, ssh: {text}}}", **more).ssh
    assert spec is not None
    return spec


def problems(text: str, **more: Any) -> list[str]:
    """As they are printed."""
    with pytest.raises(ConfigError) as caught:
        topology(text, **more)
    return [str(problem) for problem in caught.value.problems]


def problem(text: str, **more: Any) -> str:
    (only,) = problems(text, **more)
    return only
