"""The scene that this project began with: scripts expected a 4090 called Vengeance on localhost, and one elsewhere;
found was one 4090 in Iceland. Two machines, or two ways to one?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from gpumesh.lab import profile
from gpumesh.lab.lab import Lab, LabHost
from tests.cli.meshes import isolated_command
from tests.prerequisites import needs
from tests.real.command import CommandResult, Gpumesh

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture
def gpumesh(tmp_path: Path) -> Iterator[Gpumesh]:
    with isolated_command(tmp_path) as made:
        yield made


def stage_hosts(lab: Lab, iceland: LabHost, expected: str) -> str:
    """As a person writes it, with what they believed to be there."""
    return f"""\
# My two 4090s.
version: 1
name: home

defaults: # merged under every node
  ssh: {{ user: root, identity_file: {lab.identity}, known_hosts: {lab.known_hosts}, agent: false }}

nodes:
  # The rented one.
  - name: iceland
    ssh: {{ host: 127.0.0.1, port: {iceland.ssh_port} }}
    backend: {{ kind: ollama, port: 11434 }}
    expect:
      hostname: {expected}   # as it was once
      gpus: 1
      gpu: NVIDIA GeForce RTX 4090

  # The tunnel that a window somewhere holds open.
  - name: local
    backend: {{ url: {iceland.backend_url} }}

  - name: vengeance # where is it?
    backend: {{ urls: [http://127.0.0.1:1, http://127.0.0.1:2] }}
    expect: {{ gpus: 1, gpu: NVIDIA GeForce RTX 4090 }}
"""


def output_of(ended: CommandResult) -> str:
    return " ".join(ended.out.split())


async def test_a_second_4090_that_is_the_first_one(gpumesh: Gpumesh, tmp_path: Path) -> None:
    folder = tmp_path / "lab"
    folder.mkdir()
    async with Lab([profile.make_host("iceland")], folder) as lab:
        iceland = lab.host("iceland")
        text = stage_hosts(lab, iceland, "af4a84245990")
        gpumesh.config.write_text(text)

        document = (await gpumesh("audit", "--json", code=3)).json()
        by_code = {finding["code"]: finding for finding in document["findings"]}
        assert set(by_code) == {"hostname-differs", "same-gpu", "backend-down"}
        # Which are the same GPU, and how sure that is.
        assert by_code["same-gpu"]["nodes"] == ["iceland", "local"]
        assert "most likely one machine: one model store" in by_code["same-gpu"]["message"]
        assert "keep iceland" in by_code["same-gpu"]["hint"]
        same = document["machines"][0]
        assert (same["nodes"], same["certain"], same["proof"]) == (["iceland", "local"], False, "store")
        assert len(same["gpus"]) == 1
        # Which one is missing.
        assert by_code["backend-down"]["node"] == "vengeance"
        assert "nothing listens on 127.0.0.1:1" in by_code["backend-down"]["message"]
        # Both ways were measured.
        times = [
            route["latency_ms"] for node in document["nodes"] for route in node["routes"] if route["state"] == "up"
        ]
        assert len(times) == 2
        assert all(time > 0 for time in times)

        # The status counts the GPU once.
        status = (await gpumesh("status", "--json")).json()
        assert (status["totals"]["gpus"], status["totals"]["vram_total_mib"]) == (1, 24564)

        shown = await gpumesh("audit", code=3)
        tree = shown.out[shown.out.index("● RTX 4090") :].splitlines()
        assert [line.split()[1] for line in tree[1:3]] == ["iceland", "local"]
        assert tree[3:5] == ["✗ not reached", tree[4]]
        assert tree[4].startswith("└ vengeance")

        # What to change.
        written = await gpumesh("audit", "--write", "--yes", code=0)
        hostname = iceland.profile.hostname
        assert f"+      hostname: {hostname}   # as it was once" in written.out
        after = gpumesh.config.read_text()
        kept = [line for line in after.splitlines() if line in text.splitlines()]
        assert len(kept) == len(text.splitlines()) - 1, "one line was corrected, the others stand as they were"
        nodes = yaml.safe_load(after)["nodes"]
        assert [node.get("enabled", True) for node in nodes] == [True, False, False]
        assert "the same GPU as iceland" in after
        assert "not found: nothing listens on 127.0.0.1:1" in after

        clean = await gpumesh("audit", code=0)
        assert "all is as mesh.yaml says" in clean.out
        assert output_of(clean).count("switched off") == 2
        assert (await gpumesh("audit", "--json", code=0)).json()["findings"] == []


async def test_a_common_gpu_by_nvidia_smi_is_certain(gpumesh: Gpumesh, tmp_path: Path) -> None:
    """Two addresses of one host: an old port that still works, say. Neither name nor store is needed to know it."""
    folder = tmp_path / "lab"
    folder.mkdir()
    async with Lab([profile.make_host("iceland")], folder) as lab:
        iceland = lab.host("iceland")
        first = iceland.node_entry()
        known = lab.known_hosts.read_text()
        lab.known_hosts.write_text(known + known.replace("127.0.0.1", "localhost"))
        second = {**first, "name": "vengeance", "ssh": {**first["ssh"], "host": "localhost"}}
        lab.write_config(gpumesh.config, nodes=[first, second])
        document = (await gpumesh("audit", "--json", code=3)).json()
    (finding,) = document["findings"]
    assert (finding["code"], finding["nodes"]) == ("same-gpu", ["iceland", "vengeance"])
    assert f"certain: nvidia-smi shows {iceland.profile.gpus[0].uuid}" in finding["message"]
    (machine,) = document["machines"]
    assert (machine["certain"], machine["proof"]) == (True, "gpu")


@pytest.mark.parametrize("transport", ["sshtunnel", pytest.param("openssh", marks=needs("ssh"))])
async def test_without_nvidia_smi_the_host_key_shows_one_machine(
    gpumesh: Gpumesh, tmp_path: Path, transport: str
) -> None:
    folder = tmp_path / "lab"
    folder.mkdir()
    async with Lab([profile.make_host("iceland", models=())], folder) as lab:
        iceland = lab.host("iceland")
        await iceland.set_faults(profile.Faults(nvidia_smi=profile.SmiMode.MISSING))
        first = iceland.node_entry()
        first["ssh"]["transport"] = transport
        known = lab.known_hosts.read_text()
        lab.known_hosts.write_text(known + known.replace("127.0.0.1", "localhost"))
        second = {**first, "name": "vengeance", "ssh": {**first["ssh"], "host": "localhost"}}
        lab.write_config(gpumesh.config, nodes=[first, second])
        document = (await gpumesh("audit", "--json", code=3)).json()
    same = next(finding for finding in document["findings"] if finding["code"] == "same-gpu")
    assert same["nodes"] == ["iceland", "vengeance"]
    assert "most likely one machine: the same SSH host key, SHA256:" in same["message"]
    assert document["machines"][0]["proof"] == "host-key"
