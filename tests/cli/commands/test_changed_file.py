"""mesh.yaml is edited while a mesh of it runs: each command that uses both says that they differ."""

from __future__ import annotations

import asyncio
import json
import socket

import httpx
import pytest

from tests.cli.commands.test_audit import by_code
from tests.cli.meshes import SimulatedMesh

pytestmark = [pytest.mark.slow]


async def read_findings(gateway: str) -> list[dict[str, str]]:
    """The findings that the gateway tells."""
    async with httpx.AsyncClient(trust_env=False) as client:
        findings: list[dict[str, str]] = (await client.get(f"{gateway}/mesh/status")).json()["findings"]
        return findings


async def test_each_command_says_that_the_file_is_not_what_runs(direct: SimulatedMesh) -> None:
    gpumesh, file = direct.gpumesh, direct.gpumesh.config
    direct.write(reload="manual")
    await gpumesh("up", "-d")
    first_text = file.read_text()
    file.write_text(first_text + "# a comment changes nothing\n")
    for command in (("status",), ("audit",)):
        ended = await gpumesh(*command)
        assert "mesh.yaml was changed" not in ended.out + ended.err, command

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]  # free again after the block: nothing listens there
    nodes = [
        {"name": "alpha", "backend": {"url": f"http://127.0.0.1:{port}"}},
        {**direct.node("beta"), "name": "gamma"},
    ]
    direct.write(nodes, reload="manual")
    differences = "gamma is not in the running mesh; beta is not in mesh.yaml any more; alpha has another backend.urls"
    assert differences in " ".join((await gpumesh("status")).out.split())
    document = (await gpumesh("status", "--json", "--check", code=3)).json()
    assert [node["name"] for node in document["nodes"]] == ["alpha", "beta"], "the state is that of what runs"
    assert differences in by_code(document)["config-changed"]["message"]
    [told] = [finding for finding in document["findings"] if finding["code"] == "config-changed"]
    while told not in (await read_findings(document["gateway"]["url"])):  # the mesh looks at its file now and then
        await asyncio.sleep(0.05)
    for arguments, code in (
        (("env",), 0),
        (("models", "list"), 0),
        (("run", "Hello"), 0),
        (("drain", "gamma"), 2),
        (("config", "check"), 0),
        (("up", "-d"), 1),
    ):
        ended = await gpumesh(*arguments, code=code)
        assert differences in ended.err, f"{arguments}: {ended}"
    assert (await gpumesh("--quiet", "env")).err == ""

    audit = (await gpumesh("audit", "--json", code=3)).json()
    codes = by_code(audit)
    assert differences in codes["config-changed"]["message"]
    assert [node["name"] for node in audit["nodes"]] == ["alpha", "gamma"], "what the file names is inspected"
    healths = {node["name"]: node["health"] for node in audit["nodes"]}
    assert healths == {"alpha": "down", "gamma": "healthy"}, "nothing listens where the file says"

    file.write_text(first_text)
    assert "config-changed" not in (await gpumesh("audit")).out
    direct.write([direct.node("alpha", weight=2.0), direct.node("beta")], reload="manual")
    seen = by_code((await gpumesh("audit", "--json", code=3)).json())
    assert "alpha has another weight" in seen["config-changed"]["message"]
    file.write_text("nodes: [")
    assert "mesh.yaml cannot be used now" in (await gpumesh("status")).out
    file.unlink()
    assert "mesh.yaml cannot be used now" in (await gpumesh("status")).out
    await gpumesh("down")


async def test_expectations_alone_are_a_remark(direct: SimulatedMesh) -> None:
    direct.write(reload="manual")
    await direct.gpumesh("up", "-d")
    document = json.loads(direct.gpumesh.config.read_text())
    document["nodes"][0]["expect"] = {"models": ["qwen2.5:7b"]}
    direct.gpumesh.config.write_text(json.dumps(document))
    audit = by_code((await direct.gpumesh("audit", "--json")).json())
    assert "config-changed" not in audit, "the audit uses those of the file"
    remark = by_code((await direct.gpumesh("status", "--json", "--check")).json())["config-changed"]
    assert remark["severity"] == "info"
    assert (await direct.gpumesh("env")).err == "", "the mesh would run as it does now"
    await direct.gpumesh("down")
