"""Each place where a name of somebody else gets into a command, a file or a shell. tests/text/test_quoting.py fails for
a new command that does not take ``quoting``; tests/real/test_shells.py shows what TAB does."""

from __future__ import annotations

import asyncio
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh import audit, config
from gpumesh.balancer.base import Candidate, Demand
from gpumesh.balancer.select import no_node_error
from gpumesh.cli.commands.audit import propose_correction
from gpumesh.cli.commands.env import ShellKind, export_lines
from gpumesh.cli.init.mesh_yaml import mesh_yaml_lines
from gpumesh.cli.init.node_drafts import Draft
from gpumesh.config.editing import edit
from gpumesh.errors import ConfigError, HostUnresolved, TunnelError
from gpumesh.gateway import error_shapes
from gpumesh.state import GatewayState, MeshState, compute_totals
from gpumesh.text.printable import printable
from gpumesh.topology import AddressCommand, BackendKind, SshSpec, Target, Topology
from gpumesh.tunnels.address_command import ask_address
from gpumesh.tunnels.openssh.options import jump_command
from tests.audit import build
from tests.cli.states import AT, healthy
from tests.gateway.fleet import serve_hosts
from tests.hostile_names import ANY_NAME, NAMES, SHELLS, check_safe_to_paste, split_with_shell

# As a probe makes it of what a host says; and what mesh.yaml takes for a line of text.
OBSERVED = ANY_NAME.map(printable).filter(bool)
SECRET = "GPUMESH_API_KEY"
LINES = [name for name in NAMES if name.isprintable()]


@pytest.mark.parametrize("name", LINES)
def test_hints_of_the_audit(name: str, tmp_path: Path) -> None:
    """What mesh.yaml names, and what hosts say."""
    expected = build.spec("one", expect=replace(build.EXPECT, models=(name,), hostname=name, gpu=name))
    there = build.state("one", gpus=(replace(build.GPU, name=name),), host=replace(build.state().host, hostname="x"))
    user = build.spec("two", ssh=SshSpec("203.0.113.7", 22, name))
    away = build.state_with_error(TunnelError(f"lost: {name}"))
    near = replace(build.direct("three"), backend=replace(build.direct().backend, targets=(Target("h", 1, path=name),)))
    other = replace(build.state_with_error(TunnelError(name)), name="three")
    topology = Topology("t", (expected, user, near))
    found = audit.collect_findings(topology, (there, replace(away, name="two"), other))
    assert {"model-missing", "node-unreachable"} <= {finding.code for finding in found}
    for finding in found:
        check_safe_to_paste(finding.hint or "", name, tmp_path)
        assert finding.message.isprintable()


@pytest.mark.parametrize("name", NAMES)
def test_where_a_model_could_be_pulled(name: str, tmp_path: Path) -> None:
    """As the gateway's 404 says it, and `run` on a terminal."""
    candidate = Candidate("a", BackendKind.OLLAMA, usable=True, models=frozenset({printable(name) + "x"}))
    error = no_node_error((candidate,), Demand(name, frozenset(BackendKind)))
    text = error_shapes.client_message(error)
    assert "models pull" in text
    check_safe_to_paste(text.removeprefix(f"model {printable(name)!r} not found: "), name, tmp_path)
    assert text.isprintable()


async def test_what_the_gateway_says_of_a_model_that_nobody_has(tmp_path: Path) -> None:
    routes = ("/api/chat", "/v1/chat/completions", "/v1/messages")
    async with serve_hosts() as fleet:
        for name in NAMES:
            if not name.strip():
                continue
            for path in routes:
                body = {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
                answer = await fleet.client.post(path, json=body)
                assert answer.status_code == 404
                error = answer.json()["error"]
                text = error if isinstance(error, str) else error["message"]
                assert text.isprintable()
                assert "gpumesh models pull " in text
                if path == routes[0]:
                    check_safe_to_paste(text[text.rindex("pulled to") :], name, tmp_path)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_variables_for_eval(shell: str, tmp_path: Path) -> None:
    values = {f"N{number}": name for number, name in enumerate((*NAMES, "it's", "\\'", "a\\"))}
    taken = "eval (string collect -- $argv[1])" if shell == "fish" else 'eval "$1"'
    script = f"{taken}; printf '%s\\0' " + " ".join(f'"$N{number}"' for number in range(len(values)))
    given_ = (
        [export_lines(values, ShellKind(shell))] if shell == "fish" else ["-", export_lines(values, ShellKind(shell))]
    )
    result = subprocess.run([shell, "-c", script, *given_], cwd=tmp_path, capture_output=True, check=True, timeout=60)
    assert result.stdout.decode().split("\0")[:-1] == list(values.values())
    assert list(tmp_path.iterdir()) == []


@given(OBSERVED, OBSERVED, st.lists(OBSERVED, max_size=3, unique=True))
def test_the_mesh_yaml_of_init(hostname: str, gpu: str, models: list[str]) -> None:
    seen = healthy("a")
    seen = replace(
        seen,
        host=replace(seen.host, hostname=hostname),
        gpus=tuple(replace(each, name=gpu) for each in seen.gpus or ()),
        backend=replace(seen.backend, models=tuple(models), catalog=()),
    )
    draft = Draft("a", {"host": "h", "port": 22, "identity_file": "/k/" + hostname}, state=seen, ports=(1,), note=gpu)
    text = "\n".join(mesh_yaml_lines([draft]))
    env = {"LOGNAME": "me", "HOME": "expanded", "abHOME": "expanded", SECRET: "expanded"}
    read = config.parse(text, file="mesh.yaml", env=env, home=Path("/home/me"))
    (node,) = read.nodes
    assert node.expect.hostname == hostname
    assert node.expect.gpu == (gpu if seen.gpus else None)
    assert node.expect.models == tuple(models)
    assert node.ssh is not None
    assert str(node.ssh.identity_files[0]) == str(Path("/k/" + hostname))
    assert (read.gateway.default_model in models) if models else read.gateway.default_model is None
    assert len(read.gateway.cors_origins) == 0


MESHES = (
    'nodes:\n  - name: a\n    backend: {url: "http://127.0.0.1:1"}\n    expect: {hostname: "old", gpu: \'old\'}\n',
    "nodes:\n- name: a\n  backend: {url: http://127.0.0.1:1}\n  expect:\n    hostname: old # a comment\n    gpu: old\n",
    '{"nodes": [{"name": "a", "backend": {"url": "http://127.0.0.1:1"}, "expect": {"hostname": "old", "gpu": "old"}}]}',
)


@given(st.sampled_from(MESHES), OBSERVED, OBSERVED)
def test_the_mesh_yaml_of_audit_write(text: str, hostname: str, gpu: str) -> None:
    path = Path("/nowhere/mesh.yaml")
    topology = edit.parse_edited(path, text)
    seen = healthy("a")
    seen = replace(
        seen,
        host=replace(seen.host, hostname=hostname),
        gpus=tuple(replace(each, name=gpu) for each in seen.gpus or ()),
        tunnel=replace(seen.tunnel, transport="direct"),
    )
    findings = audit.collect_findings(topology, (seen,))
    state = MeshState("m", AT, GatewayState(), compute_totals((seen,)), (seen,), findings)
    plan = propose_correction(path, text, topology, state)
    assert plan.manual_steps == ()
    read = edit.parse_edited(path, plan.new_text)
    codes = {finding.code for finding in findings}
    assert "hostname-differs" not in codes or read.nodes[0].expect.hostname == hostname
    assert "gpu-differs" not in codes or read.nodes[0].expect.gpu == gpu
    assert "expanded" not in plan.new_text


@pytest.mark.parametrize("text", MESHES[:2])
@pytest.mark.parametrize("said", ["x\ngateway: {listen: 0.0.0.0:1}", "x\u2028redis: {url: redis://h}", "x\x85y: 1"])
def test_a_comment_ends_with_its_line(text: str, said: str) -> None:
    new = edit.apply_edits(text, [edit.Edit(0, ("enabled",), False, f"not found: {said}")])
    path = Path("/nowhere/mesh.yaml")
    before, after = edit.parse_edited(path, text), edit.parse_edited(path, new)
    assert after == replace(before, nodes=(replace(before.nodes[0], enabled=False),))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("-")])
def test_the_program_that_looks_up_an_address(name: str, tmp_path: Path) -> None:
    with pytest.raises(HostUnresolved) as caught:
        asyncio.run(ask_address(AddressCommand((f"/nowhere/{name}",)), default_port=22, node="a"))
    check_safe_to_paste(caught.value.hint or "", name, tmp_path)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", [name for name in NAMES if "\n" not in name and "${" not in name])
def test_the_command_for_jump_hosts(shell: str, name: str, tmp_path: Path) -> None:
    """ssh runs it in the shell of its user."""
    path = Path("/keys") / name
    spec = SshSpec("h", 22, "u", identity_files=(path,), known_hosts=path, proxy_jump=("u@j1", "u@j2"))
    made = split_with_shell(shell, jump_command(spec, batch=True), tmp_path)
    quoted = f'"{path}"'.replace("%", "%%").replace("%%", "%%%%")  # for the ssh that runs it, and for the one after
    assert f"IdentityFile={quoted}" in made
    assert f"UserKnownHostsFile={quoted}" in made
    nested = next(word.removeprefix("ProxyCommand=") for word in made if word.startswith("ProxyCommand="))
    split_with_shell(shell, nested.replace("%%", "%"), tmp_path)


@pytest.mark.parametrize(
    "user",
    [
        "$(touch ran)",
        "a;touch",
        "a`b`",
        "a|b",
        "a&b",
        "a<b",
        "a(b)",
        "{a}",
        "a'b",
        'a"b',
        "a\\",
        "-oProxyCommand=x",
        "a b",
    ],
)
def test_users_that_openssh_would_not_take(user: str) -> None:
    text = f"nodes: [{{name: a, ssh: {{host: h, user: {json.dumps(user)}}}}}]"
    jump = f"nodes: [{{name: a, ssh: {{host: h, proxy_jump: [{json.dumps(user + '@j')}]}}}}]"
    for each in (text, jump):
        with pytest.raises(ConfigError, match="is not a user's name"):
            config.parse(each, file="mesh.yaml", env={"LOGNAME": "me"}, home=Path("/home/me"))


@pytest.mark.parametrize("user", ["root", "me@corp.example", "CORP\\me", "a.b-c_d", "x$", "日本"])
def test_users_of_all_kinds(user: str) -> None:
    text = f"nodes: [{{name: a, ssh: {{host: h, user: {json.dumps(user)}}}}}]"
    read = config.parse(text, file="mesh.yaml", env={"LOGNAME": "me"}, home=Path("/home/me"))
    assert read.nodes[0].ssh is not None
    assert read.nodes[0].ssh.user == user
