"""Every file in examples/ does what it says: topologies are valid, scripts read what providers answer, clients work."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from aiohttp import web

from gpumesh import config
from gpumesh.bench.simulate.fleet_file import parse_fleet
from gpumesh.errors import HostUnresolved
from gpumesh.gateway.app import Gateway
from gpumesh.lab import keys, profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.mesh.mesh import Mesh
from gpumesh.topology import AddressCommand, NodeSpec
from gpumesh.tunnels.address_command import ask_address
from tests.prerequisites import needs

EXAMPLES = Path(__file__).parents[1] / "examples"
FLEET = EXAMPLES / "fleet.yaml"  # for the simulator
TOPOLOGIES = sorted({*EXAMPLES.glob("*.yaml"), EXAMPLES / "docker" / "mesh.yaml"} - {FLEET})
PYTHON = sys.executable
GPUMESH = str(Path(PYTHON).with_name("gpumesh"))
# What stands in the variables that examples name.
SECRETS = {"GPUMESH_API_KEY": "k-0123456789", "VLLM_API_KEY": "k-abcdef", "RUNPOD_API_KEY": "rp-0123456789"}
SECRETS |= {"CHAT_KEY": "c-0123456789", "NIGHT_KEY": "n-0123456789"}


def script(name: str) -> ModuleType:
    """A script whose name is no module's."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def run(*command: str, stdin: str = "", **environment: str) -> tuple[int | None, str, str]:
    """Exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    async with asyncio.timeout(30):
        out, err = await process.communicate(stdin.encode())
    return process.returncode, out.decode(), err.decode()


# -- topologies ------------------------------------------------------------------------------------------------------


def test_the_topologies_that_the_documentation_names_are_there() -> None:
    names = {path.stem for path in TOPOLOGIES}
    assert names >= {"two-hosts", "runpod", "vastai", "jump-host", "lan-gateway", "vllm", "two-models"}


def test_the_fleet_can_be_simulated() -> None:
    nodes = parse_fleet(FLEET.read_text(), file=FLEET.name)
    assert [node.name for node in nodes] == ["rented-1", "rented-2", "workstation"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Of somebody who has a key, knows hosts, has configured `gpu3`, and has vast.ai's command line."""
    ssh = tmp_path / ".ssh"
    ssh.mkdir(mode=0o700)
    (ssh / "id_ed25519").touch(mode=0o600)
    (ssh / "id_ed25519").write_text(keys.new_key())
    (ssh / "known_hosts").touch()
    (ssh / "config").write_text("Host gpu3\n  HostName 10.0.0.13\n  User ada\n  IdentityFile ~/.ssh/id_ed25519\n")
    vastai = tmp_path / "bin" / "vastai"
    vastai.parent.mkdir()
    vastai.write_text(f"#!/bin/sh\ncat <<'E'\n{json.dumps(VAST)}\nE\n")
    vastai.chmod(0o755)
    return tmp_path


def surroundings(home: Path) -> dict[str, str]:
    path = os.pathsep.join((str(home / "bin"), os.environ["PATH"]))
    return {**SECRETS, "HOME": str(home), "PATH": path, "SSH_AUTH_SOCK": "", "XDG_RUNTIME_DIR": str(home)}


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda path: path.stem)
async def test_config_check_finds_nothing_wrong(topology: Path, home: Path) -> None:
    code, out, err = await run(GPUMESH, "config", "check", "-c", str(topology), **surroundings(home))
    assert code == 0, err
    assert "is valid" in out
    # The gateway for a whole network is told about plain HTTP; nothing else is remarked on.
    expected = ["warning: office: "] if topology.stem == "lan-gateway" else []
    told = [line for line in err.splitlines() if not line.startswith("hint")]
    assert [line[: len(start)] for line, start in zip(told, expected, strict=True)] == expected


# -- addresses from providers ----------------------------------------------------------------------------------------

POD = {"id": "xedezhzb9la3ye", "desiredStatus": "RUNNING", "publicIp": "213.173.108.12", "portMappings": {"22": 17445}}
VAST: dict[str, Any] = {
    "id": 1234567,
    "actual_status": "running",
    "public_ipaddr": "142.214.185.187\n",
    "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "20544"}], "8080/tcp": [{"HostPort": "20545"}]},
    "ssh_host": "ssh5.vast.ai",
    "ssh_port": 13322,
    "image_runtype": "ssh_direc ssh_proxy",
}
JUPYTER = {"image_runtype": "jupyter_direc ssh_direc ssh_proxy"}


@pytest.mark.parametrize(
    ("pod", "expected"),
    [
        (POD, ("213.173.108.12", 17445)),
        ([POD], ("213.173.108.12", 17445)),
        ({**POD, "portMappings": {"22": "17445", "8888": 17446}}, ("213.173.108.12", 17445)),
    ],
)
def test_runpod_address(pod: object, expected: tuple[str, int]) -> None:
    assert script("runpod-address").address(pod) == expected


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        ({**POD, "publicIp": "", "portMappings": {}}, "no address yet"),
        ({**POD, "publicIp": "", "portMappings": None}, "no address yet"),
        ({**POD, "portMappings": {}}, "no address yet"),
        ({**POD, "publicIp": None}, "no address yet"),
        ({"id": "x"}, "no address yet"),
        ({**POD, "portMappings": {"8888": 17446}}, "port 22"),
        ([], "not one pod"),
        ([POD, POD], "not one pod"),
        ("pod", "not one pod"),
    ],
)
def test_runpod_address_while_there_is_none(pod: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        script("runpod-address").address(pod)


@pytest.mark.parametrize(
    ("instance", "expected"),
    [
        (VAST, ("142.214.185.187", 20544)),
        ({"instances": VAST}, ("142.214.185.187", 20544)),
        ({"instances": [VAST]}, ("142.214.185.187", 20544)),
        ({**VAST, **JUPYTER}, ("142.214.185.187", 20544)),
        ({**VAST, "ports": None}, ("ssh5.vast.ai", 13322)),
        ({**VAST, "ports": []}, ("ssh5.vast.ai", 13322)),
        ({**VAST, "ports": {}}, ("ssh5.vast.ai", 13322)),
        ({**VAST, "ports": {"22/tcp": None}}, ("ssh5.vast.ai", 13322)),
        ({**VAST, "public_ipaddr": None}, ("ssh5.vast.ai", 13322)),
        ({**VAST, "ports": None, **JUPYTER}, ("ssh5.vast.ai", 13323)),
        ({**VAST, "ports": None, "ssh_port": "13322", "image_runtype": None}, ("ssh5.vast.ai", 13322)),
    ],
)
def test_vast_address(instance: object, expected: tuple[str, int]) -> None:
    assert script("vast-address").address(instance) == expected


@pytest.mark.parametrize(
    ("instance", "reason"),
    [
        ({"id": 1, "actual_status": None, "ports": None}, "no address yet.*starting"),
        ({**VAST, "ports": None, "ssh_port": None}, "no address yet"),
        ([], "not one instance"),
        (None, "not one instance"),
    ],
)
def test_vast_address_while_there_is_none(instance: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        script("vast-address").address(instance)


@pytest.mark.parametrize(
    ("name", "document", "expected"),
    [("runpod-address", POD, "213.173.108.12 17445\n"), ("vast-address", VAST, "142.214.185.187 20544\n")],
)
async def test_the_scripts_read_stdin_or_what_a_command_prints(
    name: str, document: object, expected: str, tmp_path: Path
) -> None:
    program, text = str(EXAMPLES / f"{name}.py"), json.dumps(document)
    assert await run(program, stdin=text) == (0, expected, "")
    file = tmp_path / "answer.json"
    file.write_text(text)
    assert await run(program, "cat", str(file)) == (0, expected, "")


@pytest.mark.parametrize("name", ["runpod-address", "vast-address"])
async def test_the_scripts_say_why_there_is_no_address(name: str) -> None:
    program = str(EXAMPLES / f"{name}.py")
    for arguments, stdin in (((), "<html>"), ((), "{}"), (("false",), ""), (("/no/such/program",), "")):
        code, out, err = await run(program, *arguments, stdin=stdin)
        assert (code, out) == (1, "")
        assert err.startswith(f"{name}: ")
        assert err.count("\n") == 1, "one sentence, no traceback"


@asynccontextmanager
async def runpod_api(seen: list[tuple[str, str | None]]) -> AsyncIterator[str]:
    """As RunPod's, for the one pod and the one key."""

    async def answer(request: web.Request) -> web.Response:
        seen.append((request.path, request.headers.get("Authorization")))
        if request.headers.get("Authorization") != f"Bearer {SECRETS['RUNPOD_API_KEY']}":
            return web.json_response({"error": "unauthorized"}, status=401)
        return web.json_response(POD)

    app = web.Application()
    app.router.add_get("/v1/pods/{pod}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def test_runpod_is_asked_with_the_key_of_the_environment() -> None:
    program = str(EXAMPLES / "runpod-address.py")
    seen: list[tuple[str, str | None]] = []
    key = SECRETS["RUNPOD_API_KEY"]
    async with runpod_api(seen) as api:
        command = (program, "--api", api, "--pod", "xedezhzb9la3ye")
        assert await run(*command, RUNPOD_API_KEY=key) == (0, "213.173.108.12 17445\n", "")
        assert seen == [("/v1/pods/xedezhzb9la3ye", f"Bearer {key}")]
        code, _, err = await run(*command, RUNPOD_API_KEY="another-key")
        assert code == 1
        assert "401" in err
        assert "another-key" not in err
        code, _, err = await run(*command, RUNPOD_API_KEY="")
        assert (code, "RUNPOD_API_KEY is not set" in err) == (1, True)


def only_node(topology: str, home: Path) -> NodeSpec:
    path = EXAMPLES / topology
    env = {"LOGNAME": "ada"}
    (node,) = config.parse(path.read_text(), file=topology, env=env, home=home, source=path).nodes
    return node


def command_of(node: NodeSpec) -> AddressCommand:
    assert node.ssh is not None
    assert node.ssh.address_from is not None
    return node.ssh.address_from


async def test_the_address_of_vastai_yaml(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a tunnel asks for it, by the command that stands in the file."""
    monkeypatch.setenv("PATH", surroundings(home)["PATH"])
    command = command_of(only_node("vastai.yaml", home))
    assert await ask_address(command, default_port=22, node="vast") == ("142.214.185.187", 20544)


async def test_the_address_of_runpod_yaml(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    command = command_of(only_node("runpod.yaml", home))
    assert command.command == (str(EXAMPLES / "runpod-address.py"), "--pod", "xedezhzb9la3ye")
    with pytest.raises(HostUnresolved, match="exit status 1"):  # without a key nothing is asked of anybody
        await ask_address(command, default_port=22, node="pod")


# -- clients ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[dict[str, str]]:
    """The environment of a client: a gateway that wants a key, over two nodes."""
    monkeypatch.setenv("GPUMESH_API_KEY", SECRETS["GPUMESH_API_KEY"])
    async with SimOllama(profile.make_instant_host("one")) as one, SimOllama(profile.make_instant_host("two")) as two:
        file = tmp_path / "mesh.yaml"
        nodes = [{"name": name, "backend": {"url": server.url}} for name, server in (("one", one), ("two", two))]
        served = {"listen": "127.0.0.1:0", "api_key_env": "GPUMESH_API_KEY"}
        file.write_text(json.dumps({"gateway": served, "nodes": nodes}))
        async with Mesh(config.load(file)) as mesh:
            await mesh.wait_first_report(15)
            async with Gateway(mesh) as server:
                yield {
                    "OLLAMA_HOST": server.url,
                    "OPENAI_BASE_URL": f"{server.url}/v1",
                    "GPUMESH_API_KEY": SECRETS["GPUMESH_API_KEY"],
                }


@pytest.mark.slow
@needs("curl")
async def test_curl(gateway: dict[str, str]) -> None:
    code, out, err = await run("bash", str(EXAMPLES / "curl.sh"), "qwen2.5:7b", **gateway)
    assert (code, err) == (0, ""), err
    answers = dict(part.split("\n", 1) for part in out.split("# ")[1:])
    assert json.loads(answers["the models of all nodes together"])["models"][0]["name"] == "qwen2.5:7b"
    assert json.loads(answers["Ollama"])["response"]
    assert "X-GPUMesh-Node: " in answers["Ollama, streamed, with the answer's headers"]
    assert '"done":true' in answers["Ollama, streamed, with the answer's headers"].replace(" ", "")
    assert json.loads(answers["OpenAI"])["choices"][0]["message"]["content"]
    assert json.loads(answers["Anthropic"])["content"][0]["text"]
    assert json.loads(answers["batch work, which lets everybody else go first"])["response"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ends"),
    [
        pytest.param("ollama_client", lambda last: last == "(qwen2.5:7b)", marks=needs("ollama")),
        pytest.param(
            "openai_client",
            lambda last: last in ("(qwen2.5:7b on one)", "(qwen2.5:7b on two)"),
            marks=needs("openai"),
        ),
    ],
)
async def test_clients(name: str, ends: Callable[[str], bool], gateway: dict[str, str]) -> None:
    command = (PYTHON, str(EXAMPLES / f"{name}.py"), "Say something", "qwen2.5:7b")
    code, out, err = await run(*command, **gateway)
    assert code == 0, err
    answer, _, last = out.rstrip("\n").rpartition("\n")
    assert answer.strip()
    assert ends(last), last
