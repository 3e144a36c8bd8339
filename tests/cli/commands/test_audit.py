"""The command `audit` on simulated hosts: what it finds, what it writes, and how it asks."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from gpumesh.config.editing import edit
from gpumesh.lab.profile import GPU_4090, LLAMA_8B, QWEN_7B, Faults, SmiMode
from tests.cli.meshes import MODEL, SimulatedMesh, quick_host, simulated_mesh
from tests.http_clients import loopback_client
from tests.real.command import Gpumesh

pytestmark = [pytest.mark.slow]


def by_code(document: Any) -> dict[str, Any]:
    return {finding["code"]: finding for finding in document["findings"]}


def node_as_expected(two: SimulatedMesh, name: str, **changes: Any) -> dict[str, Any]:
    """A host's entry with all that is true of it expected, but for ``changes``."""
    made = two.hosts[name].profile
    truth = {"hostname": made.hostname, "gpus": 1, "gpu": GPU_4090, "vram_mib": 24564, "models": [MODEL]}
    return two.node(name, expect={**truth, **changes})


async def test_a_mesh_as_expected_has_no_findings(two: SimulatedMesh) -> None:
    two.write([node_as_expected(two, "alpha"), node_as_expected(two, "beta")])
    ended = await two.gpumesh("audit", code=0)
    assert ended.err == ""
    assert ended.out.endswith("all is as mesh.yaml says\n")
    assert ended.out.count("as expected") == 14
    assert "\x1b" not in ended.out
    document = (await two.gpumesh("audit", "--json", code=0)).json()
    assert (document["schema"], document["mesh"], document["findings"]) == ("gpumesh.audit/1", "tested", [])
    assert [machine["nodes"] for machine in document["machines"]] == [["alpha"], ["beta"]]
    for node in document["nodes"]:
        (way,) = node["routes"]
        assert (way["via"], way["state"], way["offered"]) == ("sshtunnel", "up", False)
        assert way["latency_ms"] > 0
    assert document["nodes"][0]["routes"][0]["store"] != document["nodes"][1]["routes"][0]["store"]
    nothing = await two.gpumesh("audit", "--write", "--yes", code=0)
    assert "mesh.yaml is as it should be" in nothing.out


async def test_write_corrects_the_file_and_not_the_faults_of_hosts(two: SimulatedMesh) -> None:
    wrong = node_as_expected(
        two, "alpha", hostname="af4a84245990", gpus=2, gpu="NVIDIA GeForce RTX 3090", vram_mib=24576
    )
    file = two.write([wrong, node_as_expected(two, "beta", models=[MODEL, "llama3:70b"])])
    before = file.read_text()
    await two.hosts["beta"].set_faults(Faults(nvidia_smi=SmiMode.NO_DRIVER))

    document = (await two.gpumesh("audit", "--json", code=3)).json()
    codes = {(finding["code"], finding["node"]) for finding in document["findings"]}
    assert codes == {
        ("hostname-differs", "alpha"),
        ("gpu-count", "alpha"),
        ("gpu-differs", "alpha"),
        ("driver-broken", "beta"),
        ("model-missing", "beta"),
    }
    assert all(finding["message"] and finding["hint"] for finding in document["findings"])
    assert "changes" not in document

    refused = await two.gpumesh("audit", "--write", code=2)
    assert "nobody is there to agree" in refused.err
    assert '-    "hostname": "af4a84245990",' in refused.out
    assert file.read_text() == before

    asked = (await two.gpumesh("audit", "--write", "--json", code=3)).json()
    assert asked["written"] is False
    assert {f"{change['node']}.{change['path']}" for change in asked["changes"]} == {
        "alpha.expect.hostname",
        "alpha.expect.gpus",
        "alpha.expect.gpu",
    }
    assert {finding["code"] for finding in asked["left"]} == {"driver-broken", "model-missing"}
    assert file.read_text() == before

    written = await two.gpumesh("audit", "--write", "--yes", code=3)
    assert f"written: {file}" in written.err
    assert "left to you:" in written.out
    after = json.loads(file.read_text())
    assert after["nodes"][0]["expect"]["hostname"] == two.hosts["alpha"].profile.hostname
    assert (after["nodes"][0]["expect"]["gpus"], after["nodes"][0]["expect"]["gpu"]) == (1, GPU_4090)
    assert after["nodes"][1] == json.loads(before)["nodes"][1], "what is a host's fault stays expected"

    await two.hosts["beta"].set_faults(Faults())
    left = by_code((await two.gpumesh("audit", "--json", code=3)).json())
    assert set(left) == {"model-missing"}


async def test_write_asks_on_a_terminal(two: SimulatedMesh) -> None:
    file = two.write([node_as_expected(two, "alpha", gpus=3)])
    before = file.read_text()
    async with two.gpumesh.terminal("audit", "--write") as asking:
        await asking.wait_for_text("[y/N]")
        asking.press("n\r")
        assert await asking.wait_exit() == 1
    assert file.read_text() == before
    async with two.gpumesh.terminal("audit", "--write") as asking:
        await asking.wait_for_text("[y/N]")
        asking.press("y\r")
        assert await asking.wait_exit() == 0
    assert json.loads(file.read_text())["nodes"][0]["expect"]["gpus"] == 1
    assert "\x1b[" in asking.written, "in colours"
    async with two.gpumesh.terminal("audit", NO_COLOR="1") as plain:
        assert await plain.wait_exit() == 0
        await plain.wait_for_text("all is as mesh.yaml says")
    assert "\x1b[3" not in plain.written


async def test_audit_of_a_running_mesh(two: SimulatedMesh) -> None:
    file = two.write([node_as_expected(two, "alpha", gpus=3), node_as_expected(two, "beta")])
    await two.gpumesh("up", "-d")
    document = (await two.gpumesh("audit", "--json", code=3)).json()
    assert set(by_code(document)) == {"gpu-count"}
    assert document["nodes"][0]["routes"][0]["latency_ms"] > 0
    written = await two.gpumesh("audit", "--write", "--yes", code=0)
    assert "the running mesh takes it over within a few seconds" in written.err
    # Compared is what the file says now, not what the running mesh was started with.
    assert (await two.gpumesh("audit", "--json", code=0)).json()["findings"] == []
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "nodes": [two.node("alpha"), {**two.node("beta"), "name": "new"}]})
    )
    later = by_code((await two.gpumesh("audit", "--json", code=3)).json())
    assert "new is not in the running mesh; beta is not in mesh.yaml any more" in later["config-changed"]["message"]
    await two.gpumesh("down")


async def test_a_running_mesh_that_loads_again_and_again(gpumesh: Gpumesh) -> None:
    """Its own figures say so; a mesh that is opened for the audit has none."""
    host = quick_host("alpha", ssh=False, models=(QWEN_7B, LLAMA_8B), max_loaded=1, load_s=1.0)
    async with simulated_mesh(gpumesh, host) as mesh:
        await gpumesh("up", "-d")
        url = (await gpumesh("status", "--json")).json()["gateway"]["url"]
        # Not by commands: on a busy machine their own time would make the loads' share too small for the finding.
        async with loopback_client(base_url=url, timeout=60) as client:
            for model in (QWEN_7B, LLAMA_8B) * 3:
                body = {"model": model.name, "messages": [{"role": "user", "content": "hello"}], "stream": False}
                assert (await client.post("/api/chat", json=body)).status_code == 200
        found = by_code((await gpumesh("audit", "--json", code=3)).json())["thrashing"]
        assert (found["severity"], found["node"]) == ("warning", "alpha")
        assert "llama3.1:8b and qwen2.5:7b push each other out" in found["message"]
        assert "`nodes` of each model" in found["hint"]
        shown = (await gpumesh("status", "-v")).out
        assert "6 loads in the last " in shown
        assert "last llama3.1:8b " in shown
        assert "TOK/S ALONE" in shown
        explained = (await gpumesh("explain", "thrashing")).out
        assert "context_steps" in explained
        await gpumesh("down")
        assert "thrashing" not in by_code((await mesh.gpumesh("audit", "--json")).json())


async def test_candidates_are_compared(direct: SimulatedMesh) -> None:
    urls = [f"http://127.0.0.1:{direct.hosts[name].backend_port}" for name in ("alpha", "beta")]
    direct.write([{"name": "both", "backend": {"urls": [*urls, "http://127.0.0.1:1"]}}])
    document = (await direct.gpumesh("audit", "--json", code=3)).json()
    found = by_code(document)
    assert {"routes-differ", "route-dead"} <= set(found)
    assert urls[1] in found["routes-differ"]["message"]
    assert "http://127.0.0.1:1" in found["route-dead"]["message"]
    assert [way["state"] for way in document["nodes"][0]["routes"]] == ["up", "up", "down"]


async def test_write_corrects_the_kind_of_a_server(direct: SimulatedMesh, gpumesh: Gpumesh) -> None:
    """The stand-in without its native API is what llama-server is to a mesh.yaml that says ollama."""
    await direct.hosts["alpha"].set_faults(Faults(status=404, paths=("/api",)))
    backend = direct.node("alpha")["backend"] | {"kind": "ollama"}
    file = direct.write([direct.node("alpha", backend=backend)])
    assert "wrong-server" in by_code((await gpumesh("audit", "--json", code=3)).json())
    await gpumesh("audit", "--write", "--yes", code=0)
    assert json.loads(file.read_text())["nodes"][0]["backend"]["kind"] == "openai"
    await gpumesh("audit", code=0)


async def test_a_change_that_cannot_be_written_is_left_to_a_person(two: SimulatedMesh) -> None:
    file = two.gpumesh.config
    ssh = json.dumps(dict(two.ssh))
    node = two.node("alpha")
    text = (
        f"# mine\ndefaults:\n  ssh: {ssh}\n  expect: &gpus {{gpus: 7}}\nnodes:\n"
        f"  - name: alpha\n    ssh: {json.dumps(node['ssh'])}\n    backend: {json.dumps(node['backend'])}\n"
        "    expect: *gpus\n"
    )
    file.write_text(text)
    ended = await two.gpumesh("audit", "--write", "--yes", code=3)
    assert "by hand: nodes[0].expect is not written out there: it should be 1" in ended.err
    assert "nothing in mesh.yaml would put this right" in ended.out
    assert file.read_text() == text


async def test_write_keeps_comments_and_everything_else(two: SimulatedMesh, tmp_path: Path) -> None:
    node = two.node("alpha")
    text = (
        "# The GPUs of a person who writes comments.\r\nversion: 1\r\n\r\ndefaults:\r\n"
        f"    ssh: {json.dumps(dict(two.ssh))} # for all\r\n\r\nnodes:\r\n"
        "    # the first\r\n    -   name:   'alpha'\r\n"
        f"        ssh:  {{ host: 127.0.0.1, port: {node['ssh']['port']} }}\r\n"
        "        backend:   {kind: ollama}\r\n        expect:\r\n            gpus:    2   # once there were two\r\n"
        "            gpu: RTX 4090\r\n\r\n# the end\r\n"
    )
    real = tmp_path / "real.yaml"
    real.write_bytes(text.encode())
    real.chmod(0o640)
    two.gpumesh.config.unlink()
    two.gpumesh.config.symlink_to(real)
    await two.gpumesh("audit", "--write", "--yes", code=0)
    assert real.read_bytes().decode() == text.replace("gpus:    2", "gpus:    1")
    assert real.stat().st_mode & 0o777 == 0o640
    assert two.gpumesh.config.is_symlink()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


async def test_write_switches_nothing_off_when_no_node_can_be_reached(gpumesh: Gpumesh) -> None:
    """Then it is this machine's network, and nothing is written off."""
    nodes = [{"name": name, "backend": {"url": f"http://127.0.0.1:{port}"}} for name, port in (("a", 1), ("b", 2))]
    gpumesh.config.write_text(json.dumps({"nodes": nodes}))
    before = edit.read(gpumesh.config)
    ended = await gpumesh("audit", "--write", "--yes", code=3)
    assert "nothing in mesh.yaml would put this right" in ended.out
    assert ended.out.count("backend-down") == 2
    assert edit.read(gpumesh.config) == before


async def test_a_silent_host_is_a_finding_in_time(two: SimulatedMesh) -> None:
    """However patient mesh.yaml is: who asks now is told by now. The others are looked at meanwhile."""

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    async with server:
        hung = two.node("beta")
        hung["ssh"] = {"host": "127.0.0.1", "port": server.sockets[0].getsockname()[1], "connect_timeout": "60s"}
        two.write([node_as_expected(two, "alpha"), hung])
        ended = await two.gpumesh("audit", "--json", code=3)
    document = ended.json()
    (finding,) = document["findings"]
    assert (finding["code"], finding["node"]) == ("node-unreachable", "beta")
    assert "no connection within 7 s" in finding["message"]
    assert "firewall" in finding["hint"]
    assert document["nodes"][0]["routes"][0]["latency_ms"] > 0
    assert ended.wall_s < 30.0


async def test_wrong_usage_is_refused(gpumesh: Gpumesh) -> None:
    gpumesh.config.write_text("nodes: [{name: a, backend: {url: 'http://127.0.0.1:1'}}]")
    assert "--yes belongs to --write" in (await gpumesh("audit", "--yes", code=2)).err
    gpumesh.config.write_text("nodes: [{nmae: a}]")
    assert "did you mean" in (await gpumesh("audit", code=2)).err
