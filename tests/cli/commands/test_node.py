"""`gpumesh node` by the installed command: a host is rented, used and given back while the mesh runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import yaml
from typer.testing import CliRunner

from gpumesh.cli.root_command import app
from gpumesh.errors import ExitCode, UsageError
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import GPU_4090, Faults
from tests.cli.meshes import MODEL, SimulatedMesh, isolated_command, quick_host, simulated_mesh
from tests.http_clients import loopback_client

slow = pytest.mark.slow
in_the_modules_loop = pytest.mark.asyncio(loop_scope="module")

# From a pod's ssh line to its first answer. Where many programs wait for a processor, the time says nothing about ours.
ANSWER_LIMIT_S = 20.0 if os.getloadavg()[0] < 3 * (os.cpu_count() or 1) else 60.0

FILE = """# my mesh
version: 1
name: tested
gateway: {{listen: "127.0.0.1:0", default_model: "qwen2.5:7b"}}
defaults:
  ssh: {{identity_file: {identity_file}, known_hosts: {known_hosts}, agent: false}}   # for all

nodes:
  - name: alpha   # under the desk
    ssh: {{host: 127.0.0.1, port: {port}, user: root}}
    backend: {{port: 11434}}

# the end
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosts(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SimulatedMesh]:
    """A host in a mesh.yaml with comments, and two pods that nobody knows yet."""
    with isolated_command(tmp_path_factory.mktemp("node")) as gpumesh:
        hosts = (quick_host("alpha"), quick_host("pod", gpus=2), quick_host("other"))
        async with simulated_mesh(gpumesh, *hosts) as made:
            yield made


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(hosts: SimulatedMesh) -> SimulatedMesh:
    """The hosts, with a mesh.yaml of the first alone."""
    text = FILE.format(
        **{key: hosts.ssh[key] for key in ("identity_file", "known_hosts")}, port=hosts.hosts["alpha"].ssh_port
    )
    hosts.gpumesh.config.write_text(text)
    return hosts


def line(mesh: SimulatedMesh, name: str, *, port: int | None = None) -> str:
    return f"ssh root@127.0.0.1 -p {port or mesh.hosts[name].ssh_port}"


def node_names(mesh: SimulatedMesh) -> list[str]:
    return [node["name"] for node in yaml.safe_load(mesh.gpumesh.config.read_text())["nodes"]]


@slow
@in_the_modules_loop
async def test_from_a_pods_line_to_its_first_answer_and_back(mesh: SimulatedMesh) -> None:
    gpumesh = mesh.gpumesh
    before = gpumesh.config.read_text()
    url = re.findall("serving (http://[0-9.:]+)", (await gpumesh("up", "-d")).err)[0]
    began = time.monotonic()
    ended = await gpumesh("node", "add", line(mesh, "pod"), "--name", "pod", "--yes")
    request = {"model": MODEL, "prompt": "hi", "stream": False}
    async with loopback_client(base_url=url) as client:
        answer = await client.post("/api/generate", json=request, headers={"X-GPUMesh-Node": "pod"})
        # On a busy machine the command may end before the pod's first report.
        while answer.status_code == 503 and time.monotonic() - began < ANSWER_LIMIT_S:
            await asyncio.sleep(0.1)
            answer = await client.post("/api/generate", json=request, headers={"X-GPUMesh-Node": "pod"})
        assert (answer.status_code, answer.headers["X-GPUMesh-Node"]) == (200, "pod"), answer.text
        assert time.monotonic() - began < ANSWER_LIMIT_S
        await replace(mesh, gateway_url=url).wait_all_up()
        added, pool = ended.out.splitlines()[-2:]
        assert added == f"added pod: ollama 0.12.6-lab on port 11434, 2 x {GPU_4090}, 1 model"
        assert re.match(r"the pool now has 2 nodes, 3 GPUs, 7|the pool now has 2 nodes \([01] up\)", pool)
        text = gpumesh.config.read_text()
        assert text.replace("\n# the end\n", "").startswith(before.replace("\n# the end\n", ""))

        ended = await gpumesh("node", "edit", "pod", "weight=2", "labels.rented=yes")
        assert ended.out.startswith("changed pod\nthe pool now has 2 nodes")
        nodes = (await gpumesh("node", "list", "--json")).json()["nodes"]
        assert [node["name"] for node in nodes] == ["alpha", "pod"]
        assert all(node["health"] is not None for node in nodes), "what the running mesh says"

        ended = await gpumesh("node", "rm", "pod")
        assert ended.out.startswith("removed pod\nthe pool now has 1 node")
        assert "  weight: 2" in ended.err, "what to put back"
        assert gpumesh.config.read_text() == before
        answer = await client.post("/api/generate", json=request, headers={"X-GPUMesh-Node": "pod"})
        assert answer.status_code >= 400
    await gpumesh("down")


@slow
@in_the_modules_loop
async def test_two_at_once_are_both_in_the_file(mesh: SimulatedMesh) -> None:
    gpumesh = mesh.gpumesh
    before = gpumesh.config.read_text()
    ends = await asyncio.gather(
        gpumesh("node", "add", f"pod={line(mesh, 'pod')}", "-y"), gpumesh("node", "add", line(mesh, "other"), "-y")
    )
    assert sorted(node_names(mesh)) == ["alpha", "host-127-0-0-1", "pod"]
    assert all("no mesh is running: `gpumesh up -d` starts it" in ended.err for ended in ends)
    pool = "mesh.yaml now has 3 nodes, 3 GPUs, 72.0 GiB (1 node without `expect`)\n"
    assert any(ended.out.endswith(pool) for ended in ends)
    ended = await gpumesh("node", "add", line(mesh, "pod"), code=ExitCode.USAGE)
    assert "pod is that host already" in ended.err
    await gpumesh("node", "rm", "host-127-0-0-1", "pod", "-q")
    assert gpumesh.config.read_text() == before
    known_hosts = Path(mesh.ssh["known_hosts"]).read_text()
    assert "-node-pod " not in known_hosts, "tomorrow another machine may have that name"


@slow
@in_the_modules_loop
async def test_a_host_that_is_not_reached_is_added_by_force_alone(mesh: SimulatedMesh) -> None:
    gpumesh = mesh.gpumesh
    before = gpumesh.config.read_text()
    ended = await gpumesh("node", "add", line(mesh, "pod", port=9), "--name", "off", code=ExitCode.FAILED)
    assert ended.err.splitlines()[1].endswith("off: nothing listens on 127.0.0.1:9; mesh.yaml was left as it is")
    assert ended.err.endswith("; --force adds it all the same\n")
    assert gpumesh.config.read_text() == before
    ended = await gpumesh("node", "add", line(mesh, "pod", port=9), "-n", "off", "--force", code=ExitCode.DEGRADED)
    assert "added off: nothing listens on 127.0.0.1:9\n" in ended.out
    assert node_names(mesh) == ["alpha", "off"]


@slow
@in_the_modules_loop
async def test_ctrl_c_while_it_looks_leaves_the_file_as_it_was(mesh: SimulatedMesh) -> None:
    before = mesh.gpumesh.config.read_text()
    await mesh.hosts["pod"].set_faults(Faults(ssh_hang=True))
    try:
        async with mesh.gpumesh.started("node", "add", line(mesh, "pod")) as process:
            assert process.stderr is not None
            assert b"looking at host-127-0-0-1" in await process.stderr.readline()
            process.send_signal(signal.SIGINT)
            await process.communicate()
            assert process.returncode == ExitCode.INTERRUPTED
    finally:
        await mesh.hosts["pod"].set_faults(Faults())
    assert mesh.gpumesh.config.read_text() == before


@slow
@in_the_modules_loop
async def test_the_first_host_makes_the_file_and_all_its_servers_are_named(mesh: SimulatedMesh) -> None:
    path, pod = mesh.gpumesh.config, mesh.hosts["pod"]
    path.unlink()
    assert pod.ssh is not None
    ports = dict(pod.ssh.ports)
    async with SimOllama(quick_host("second")) as second:
        pod.ssh.ports.clear()  # servers on unusual ports, and one port where nothing answers
        pod.ssh.ports.update({9123: ports[11434], 9500: second.port, 9600: 9})
        words = f"{line(mesh, 'pod')} -i {mesh.ssh['identity_file']}".split()  # a person may forget the quotes
        try:
            ended = await mesh.gpumesh("node", "add", *words, "-y", "--name", "pod")
        finally:
            pod.ssh.ports.clear()
            pod.ssh.ports.update(ports)
    assert "pod: ollama 0.12.6-lab on port 9123, " in ended.err
    assert "; there is also ollama on port 9500\n" in ended.err
    assert ended.out.splitlines()[-1].startswith(f"wrote {path}; try it: ")
    assert "    # also there: ollama on port 9500\n" in path.read_text()
    assert yaml.safe_load(path.read_text())["nodes"][0]["backend"] == {"port": 9123}


@slow
@in_the_modules_loop
async def test_expectations_are_filled_in_later(mesh: SimulatedMesh) -> None:
    path = mesh.gpumesh.config
    text = path.read_text().replace("11434}\n", "11434}\n    expect: {gpus: 7} # mine\n")
    path.write_text(text)
    ended = await mesh.gpumesh("init", "--refresh")
    assert ended.out.startswith(f"alpha: hostname {mesh.hosts['alpha'].profile.hostname}, gpu {GPU_4090}, vram_mib")
    expect = yaml.safe_load(path.read_text())["nodes"][0]["expect"]
    assert (expect["gpus"], expect["gpu"], expect["models"]) == (7, GPU_4090, [MODEL])
    assert [row for row in path.read_text().splitlines() if "expect" not in row] == [
        row for row in text.splitlines() if "expect" not in row
    ]


@slow
@in_the_modules_loop
async def test_init_offers_to_add_to_a_file_that_is_there(mesh: SimulatedMesh) -> None:
    path = mesh.gpumesh.config
    refused = CliRunner().invoke(app, ["init", "-O", str(path), "--from", line(mesh, "pod")]).exception
    assert isinstance(refused, UsageError)
    assert (refused.hint or "").startswith("`gpumesh node add 'ssh …'` adds a host to it; --force overwrites it")
    async with mesh.gpumesh.terminal("init", "-O", str(path)) as shown:
        await shown.wait_for_text("Add hosts to it?")
        shown.press("\n")
        place = await shown.wait_for_text("host 1: ")
        shown.press("ssh root@::::\n")
        place = await shown.wait_for_text("neither a host name nor an address", after=place)
        place = await shown.wait_for_text("host 1: ", after=place)
        shown.press(f"pod=root@127.0.0.1:{mesh.hosts['pod'].ssh_port}\n")
        place = await shown.wait_for_text("host 2: ", after=place)
        shown.press("\n")
        await shown.wait_for_text("added pod: ollama", after=place)
        assert await shown.wait_exit() == 0
    assert node_names(mesh) == ["alpha", "pod"]


@slow
@in_the_modules_loop
async def test_what_was_typed_is_shown_again_when_it_ends_early(mesh: SimulatedMesh, tmp_path: Path) -> None:
    output = tmp_path / "new.yaml"
    async with mesh.gpumesh.terminal("init", "-O", str(output)) as shown:
        await shown.wait_for_text("host 1: ")
        shown.press("root@127.0.0.1:9\n")
        await shown.wait_for_text("host 2: ")
        shown.press("\x03")
        with contextlib.suppress(TimeoutError):
            while not await shown.exits_within(4.0):
                shown.press("\x03")
        assert "what you typed: gpumesh init --from root@127.0.0.1:9" in shown.plain_text
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "root@h:22", "root@h2", "--name", "x"], "--name is for one host"),
        (["add", "ssh -p 22"], "names no host"),
        (["add", "root@h", "--name", "a b"], "name: 'a b' is not a name"),
        (["add", "root@h", "--name", "alpha"], "there is already a node alpha"),
        (["rm", "alpha"], "it is the only node"),
        (["rm", "nobody"], "there is no node 'nobody'"),
        (["edit", "alpha", "wieght=2"], "wieght: unknown key 'wieght'"),
        (["edit", "alpha", "weight"], "is no KEY=VALUE"),
    ],
)
def test_what_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text(FILE.format(identity_file="k", known_hosts="h", port=9))
    before = file.read_text()
    error = CliRunner().invoke(app, ["-c", str(file), "node", *arguments]).exception
    assert isinstance(error, UsageError)
    assert message in error.message
    assert "mesh.yaml:" not in error.message, "no lines of a file that nobody has seen"
    assert file.read_text() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
@in_the_modules_loop
async def test_a_read_only_file(mesh: SimulatedMesh) -> None:
    mesh.gpumesh.config.chmod(0o400)
    ended = await mesh.gpumesh("node", "edit", "alpha", "weight=2", code=ExitCode.FAILED)
    assert "is read-only; it was left as it is" in ended.err
