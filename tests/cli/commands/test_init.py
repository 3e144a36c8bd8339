"""`gpumesh init` by the installed command: from a provider's line to the first answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import EMBEDDER, GPU_4090, QWEN_7B
from tests.cli.meshes import SimulatedMesh, quick_host, simulated_mesh
from tests.prerequisites import is_there, needs
from tests.real.command import Gpumesh
from tests.real.netns import private_network
from tests.tunnels.sshd import Sshd

slow = pytest.mark.slow


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_network() -> Iterator[None]:
    """On the ports of this machine that ``init`` looks at, other programs may listen, and other tests do."""
    with private_network() if is_there("netns") else contextlib.nullcontext():
        yield


@pytest.fixture
async def pod(gpumesh: Gpumesh) -> AsyncIterator[SimulatedMesh]:
    """One host with two GPUs that nobody has a mesh.yaml of, and an empty known_hosts."""
    async with simulated_mesh(gpumesh, quick_host("pod", gpus=2, models=(EMBEDDER, QWEN_7B))) as made:
        gpumesh.config.unlink()
        yield made


def line(pod: SimulatedMesh, *, port: int | None = None) -> str:
    return f"ssh root@127.0.0.1 -p {port or pod.hosts['pod'].ssh_port} -i {pod.ssh['identity_file']}"


@slow
async def test_from_a_providers_line_to_the_first_answer(pod: SimulatedMesh) -> None:
    gpumesh = pod.gpumesh
    ended = await gpumesh("init", "--from", f"mine={line(pod)} -L 8080:localhost:11434", "--yes")
    assert ended.out.endswith("wrote mesh.yaml; try it: gpumesh run 'Hello'\n")
    assert f"mine: ollama 0.12.6-lab on port 11434, 2 x {GPU_4090}, 2 models" in ended.err
    file = gpumesh.home / "mesh.yaml"
    text = file.read_text()
    assert "#" in text
    document = yaml.safe_load(text)
    (node,) = document["nodes"]
    assert document["gateway"]["default_model"] == "qwen2.5:7b", "not the one that only embeds"
    assert node["backend"] == {"port": 11434}
    assert node["expect"] == {
        "hostname": pod.hosts["pod"].profile.hostname,
        "gpus": 2,
        "gpu": GPU_4090,
        "vram_mib": 24564,
        "models": ["nomic-embed-text:latest", "qwen2.5:7b"],
    }
    assert "[127.0.0.1]:" in (gpumesh.home / ".ssh" / "known_hosts").read_text()
    answer = await gpumesh("run", "-c", str(file), "Hello", "-o", "num_predict=2")
    assert answer.out.strip()
    assert (await gpumesh("audit", "-c", str(file), code=None)).code in (0, 3)

    before = file.read_text()
    ended = await gpumesh("init", "--from", line(pod), "--yes", code=2)
    assert "mesh.yaml is there already" in ended.err
    assert file.read_text() == before
    await gpumesh("init", "--from", line(pod), "--yes", "--force", "-q")
    assert file.read_text() != before


@slow
async def test_a_host_that_is_away_is_written_down_with_the_reason(pod: SimulatedMesh) -> None:
    ended = await pod.gpumesh("init", "--from", line(pod), "--from", f"off={line(pod, port=9)}", "-y", code=3)
    assert "off: nothing listens on" in ended.err
    text = (pod.gpumesh.home / "mesh.yaml").read_text()
    assert "# not seen when this was written: nothing listens on" in text
    assert [node["name"] for node in yaml.safe_load(text)["nodes"]] == ["host-127-0-0-1", "off"]
    ended = await pod.gpumesh("config", "check", "-c", str(pod.gpumesh.home / "mesh.yaml"))
    assert "is valid: 2 nodes" in ended.out


@slow
async def test_an_unknown_host_key_is_not_trusted_by_itself(pod: SimulatedMesh) -> None:
    ended = await pod.gpumesh("init", "--from", line(pod), code=3)
    assert "host key" in ended.err
    assert ended.out == "wrote mesh.yaml; when a server is there: gpumesh audit\n"
    assert not (pod.gpumesh.home / ".ssh" / "known_hosts").exists()


@slow
@pytest.mark.real
@needs("sshd", "ssh")
async def test_keys_on_the_way_are_recorded_too(pod: SimulatedMesh, tmp_path: Path) -> None:
    identity = pod.ssh["identity_file"]
    public = subprocess.run(["ssh-keygen", "-yf", identity], capture_output=True, check=True, timeout=20).stdout
    async with Sshd(tmp_path / "jump", {"LogLevel": "ERROR"}) as jump:
        jump.authorized_keys.write_bytes(public)
        way = f"{line(pod)} -J {jump.spec().user}@127.0.0.1:{jump.port}"
        ended = await pod.gpumesh("init", "--from", f"mine={way}", "--yes")
        assert f"mine (jump host)  [127.0.0.1]:{jump.port}  ssh-ed25519 SHA256:" in ended.out
        assert f"mine: ollama 0.12.6-lab on port 11434, 2 x {GPU_4090}, 2 models" in ended.err


@slow
async def test_from_ssh_config(pod: SimulatedMesh) -> None:
    folder = pod.gpumesh.home / ".ssh"
    folder.mkdir(mode=0o700)
    (folder / "config").write_text(
        f"Host work\n  HostName 127.0.0.1\n  Port {pod.hosts['pod'].ssh_port}\n  User root\n"
        f"  IdentityFile {pod.ssh['identity_file']}\n"
    )
    await pod.gpumesh("init", "--from-ssh-config", "work", "-y", "-O", "other.yaml")
    document = yaml.safe_load((pod.gpumesh.home / "other.yaml").read_text())
    assert document["nodes"][0]["ssh"] == {"alias": "work"}
    assert document["nodes"][0]["expect"]["gpus"] == 2


@slow
@pytest.mark.parametrize("shape", ["runpod", "vast", "lines"])
async def test_from_standard_input(pod: SimulatedMesh, shape: str) -> None:
    port = pod.hosts["pod"].ssh_port
    given: dict[str, Any] = {
        "runpod": [
            {"id": "a", "name": "my pod", "publicIp": "127.0.0.1", "portMappings": {"22": port}},
            {"id": "b", "name": "asleep", "desiredStatus": "EXITED", "publicIp": None, "portMappings": None},
        ],
        "vast": {
            "instances": [{"id": 7, "public_ipaddr": "127.0.0.1", "ports": {"22/tcp": [{"HostPort": str(port)}]}}]
        },
    }
    stdin = json.dumps(given[shape]) if shape in given else f"# mine\nthere=ssh root@127.0.0.1 -p {port}\n\n"
    ended = await pod.gpumesh("init", "--from", "-", "-i", pod.ssh["identity_file"], "--yes", stdin=stdin)
    (node,) = yaml.safe_load((pod.gpumesh.home / "mesh.yaml").read_text())["nodes"]
    assert node["name"] == {"runpod": "my-pod", "vast": "vast-7", "lines": "there"}[shape]
    assert node["ssh"]["identity_file"] == pod.ssh["identity_file"]
    assert node["expect"]["gpus"] == 2
    assert ("asleep is left out: it has no address yet (it is EXITED)" in ended.err) == (shape == "runpod")


@slow
@pytest.mark.real
@needs("netns")
async def test_servers_on_this_machine_are_found_on_their_usual_ports(gpumesh: Gpumesh) -> None:
    async with SimOllama(quick_host("here"), port=8081), SimOllama(quick_host("here"), port=11435):
        await gpumesh("init", "--yes", code=None)
    text = (gpumesh.home / "mesh.yaml").read_text()
    assert {node["name"] for node in yaml.safe_load(text)["nodes"]} == {"local-8081", "local-11435"}
    assert "ssh" not in text


@slow
async def test_asking_on_a_terminal(pod: SimulatedMesh) -> None:
    async with pod.gpumesh.terminal("init") as shown:
        place = await shown.wait_for_text("host 1: ")
        shown.press("ssh -p 22\n")
        place = await shown.wait_for_text("names no host", after=place)
        place = await shown.wait_for_text("host 1: ", after=place)
        shown.press(f"asked={line(pod)}\n")
        place = await shown.wait_for_text("host 2: ", after=place)
        shown.press("\n")
        place = await shown.wait_for_text("Is this the right fingerprint? Record it?", after=place)
        shown.press("y\n")
        await shown.wait_for_text("wrote mesh.yaml", after=place)
        assert await shown.wait_exit() == 0
    assert yaml.safe_load((pod.gpumesh.home / "mesh.yaml").read_text())["nodes"][0]["name"] == "asked"


@slow
async def test_a_key_that_is_not_the_right_one_ends_it_with_a_word(pod: SimulatedMesh) -> None:
    async with pod.gpumesh.terminal("init", "--from", line(pod)) as shown:
        await shown.wait_for_text("Record it?")
        shown.press("n\n")
        assert await shown.wait_exit() == 1
        assert "not the right one; no mesh.yaml was written" in shown.plain_text
    assert not (pod.gpumesh.home / "mesh.yaml").exists()


@slow
@pytest.mark.parametrize("when", ["asked for a host", "asked for a key", "looking"])
async def test_ctrl_c_leaves_no_file(pod: SimulatedMesh, when: str) -> None:
    arguments = ("--from", line(pod)) if when != "asked for a host" else ()
    if when == "looking":
        from gpumesh.lab.profile import Faults

        await pod.gpumesh("init", "--from", line(pod), "-y", "-O", "x.yaml", "-q")
        (pod.gpumesh.home / "x.yaml").unlink()
        await pod.hosts["pod"].set_faults(Faults(hang=True))
    async with pod.gpumesh.terminal("init", *arguments) as shown:
        await shown.wait_for_text(
            {"asked for a host": "host 1: ", "asked for a key": "Record it?", "looking": "looking at"}[when]
        )
        if when == "looking":
            await asyncio.sleep(0)
            shown.process.send_signal(signal.SIGINT)
        else:
            # readline may miss a signal that comes just before it waits; a person would press the key again.
            shown.press("\x03")
            while not await shown.exits_within(4.0):
                shown.press("\x03")
        assert await shown.wait_exit() == 130
        assert shown.modes() == shown.modes_before
        assert "Traceback" not in shown.plain_text
    assert [path.name for path in pod.gpumesh.home.iterdir() if path.name != ".ssh"] in ([], [".local"])


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (["--from", "ssh -p 22"], None, "names no host"),
        (["--from", "ssh abc@ssh.runpod.io"], None, "forwards no ports"),
        (["--from", "-"], "{", "is not JSON"),
        (["--from", "-"], "[]", "no pod"),
        (["--from-ssh-config", "-oProxyCommand=x"], None, "error: '-oProxyCommand=x' is not the name of a Host"),
        (["-O", "."], None, "is a folder"),
        (["-O", "nowhere/mesh.yaml"], None, "there is no folder nowhere"),
        (["--from", "ssh root@h:22 -p 1"], None, "port"),
    ],
)
@slow
async def test_what_is_refused(gpumesh: Gpumesh, arguments: list[str], stdin: str | None, said: str) -> None:
    ended = await gpumesh("init", *arguments, "--yes", stdin=stdin, code=2)
    assert said in ended.err
    assert ended.out == ""
    assert not (gpumesh.home / "mesh.yaml").exists()
