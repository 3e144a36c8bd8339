"""What is wrong with a mesh.yaml, as each command tells it: one clear report, exit 2, whatever the command."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.real.command import Gpumesh

NODE = "nodes:\n  - name: a\n    backend: {url: http://127.0.0.1:11434}\n"


def fifty_errors() -> str:
    nodes = (f"  - {{name: n{number}, ssh: {{host: h, port: 99999}}, backend: {{port: 80}}}}\n" for number in range(50))
    return "nodes:\n" + "".join(nodes)


BAD = {
    "empty": ("", "mesh.yaml"),
    "tabs": ("nodes:\n\t- name: a\n", "mesh.yaml:2:1"),
    "duplicated names": (NODE + "  - name: a\n    backend: {port: 80}\n", "mesh.yaml:4"),
    "port 99999": ("nodes:\n  - name: a\n    ssh: {host: h, port: 99999}\n    backend: {port: 80}\n", "mesh.yaml:3"),
    "unknown key": (NODE.replace("backend", "bakend"), "did you mean"),
    "no nodes": ("version: 1\nnodes: []\n", "nodes"),
    "50 errors": (fifty_errors(), "mesh.yaml:51"),
    "no YAML": ("nodes: [", "mesh.yaml:"),
    "binary": ("\x00\x01\x02", "mesh.yaml"),
}


async def refused(alone: Gpumesh, *arguments: str) -> str:
    ended = await replace(alone, warm=True)(*arguments, code=2)
    assert ended.out == ""
    assert alone.processes() == set()
    return ended.err


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
async def test_a_bad_file_is_one_report(alone: Gpumesh, name: str) -> None:
    text, told = BAD[name]
    alone.config.write_text(text)
    report = await refused(alone, "status")
    assert told in report
    for arguments in (["run", "Hello"], ["up", "-d"]):
        assert await refused(alone, *arguments) == report, "the same words whoever reads it"


async def test_all_of_fifty_problems_are_told_at_once(alone: Gpumesh) -> None:
    alone.config.write_text(fifty_errors())
    report = await refused(alone, "status")
    assert [int(found) for found in re.findall(r"mesh\.yaml:(\d+)", report)] == list(range(2, 52))


async def test_a_directory_and_a_file_that_is_not_there(alone: Gpumesh, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "folder" in await refused(alone, "-c", str(folder), "status")
    assert "nowhere.yaml" in await refused(alone, "-c", str(tmp_path / "nowhere.yaml"), "status")


async def test_a_file_of_another_kind(alone: Gpumesh) -> None:
    alone.config.write_text(json.dumps(["a", "list"]))
    assert "mesh.yaml" in await refused(alone, "status")
