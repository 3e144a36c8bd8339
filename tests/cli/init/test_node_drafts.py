from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gpumesh import config
from gpumesh.cli.init.mesh_yaml import mesh_yaml_lines
from gpumesh.cli.init.node_drafts import LOCAL_PORTS, Draft, make_drafts, node_name, summarize_draft
from gpumesh.cli.init.provider_pods import Pod
from gpumesh.cli.init.ssh_command_line import parse_ssh_line
from gpumesh.topology import Topology
from tests.cli.states import gpu, healthy

HOME = Path("/home/me")


def read_back(made: list[Draft]) -> Topology:
    return config.parse("\n".join(mesh_yaml_lines(made)), file="mesh.yaml", env={"LOGNAME": "me"}, home=HOME)


def found(draft: Draft, **changes: object) -> Draft:
    return replace(draft, state=replace(healthy(draft.name), **changes), ports=(11434,))  # type: ignore[arg-type]


def test_one_draft_for_each_host_and_each_local_port() -> None:
    made = make_drafts(
        [parse_ssh_line("ssh root@h -p 22010 -i ~/k -J b"), parse_ssh_line("h")],
        ["work"],
        [Pod("My Pod", "RunPod", "1.2.3.4", 1000), Pod("away", "RunPod", unreachable_reason="it is off")],
        identity="~/other",
    )
    there = [draft for draft in made if draft.ssh is not None]
    assert [draft.name for draft in there] == ["h", "h-2", "work", "my-pod"]
    assert there[0].ssh == {"host": "h", "port": 22010, "user": "root", "identity_file": "~/k", "proxy_jump": "b"}
    assert there[1].ssh == {"host": "h", "port": 22, "identity_file": "~/other"}
    assert there[2].ssh == {"alias": "work", "identity_file": "~/other"}
    assert there[3].note is not None
    here = [draft for draft in made if draft.ssh is None]
    assert [draft.ports for draft in here] == [(port,) for port in LOCAL_PORTS]
    assert [draft.name for draft in here][:2] == ["local", "local-11435"]
    assert len({draft.name for draft in made}) == len(made)


def test_forwarded_ports_come_first() -> None:
    draft = make_drafts([parse_ssh_line("ssh h -L 8080:localhost:8000")], [])[0]
    assert draft.ports[0] == 8000
    assert len(set(draft.ports)) == len(draft.ports)


def test_summary() -> None:
    draft = found(Draft("a", None), gpus=(gpu(0), gpu(1)))
    assert summarize_draft(draft) == "a: ollama 0.12.6 on port 11434, 2 x NVIDIA GeForce RTX 4090, 2 models"
    assert (
        summarize_draft(found(Draft("a", None), gpus=None)) == "a: ollama 0.12.6 on port 11434, no GPU seen, 2 models"
    )
    assert summarize_draft(Draft("a", None)) == "a: no answer"


def test_node_names() -> None:
    assert node_name("My Pod (4090)") == "my-pod-4090"
    assert node_name("東京") == "node"
