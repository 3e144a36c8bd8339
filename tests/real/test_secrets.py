"""Secrets are planted in the environment, and then looked for wherever gpumesh leaves a trace: in the arguments of all
processes while it works, in its logs, in all that its commands and its gateway say, above all when logins fail."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from gpumesh.errors import ExitCode
from gpumesh.lab import keys
from gpumesh.lab.host import HostStart, SimHost
from gpumesh.topology import TransportKind
from tests.cli.meshes import MODEL, quick_host
from tests.http_clients import loopback_client
from tests.prerequisites import needs
from tests.real.command import GPUMESH, CommandResult, Gpumesh
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import Sshd, keygen

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(180), needs("sshd", "ssh")]

# Different in each test process: two may run tests of this module at the same time, and all processes are searched.
_OWN = f"{os.getpid():x}"
SECRETS = {
    "HOST_PASSWORD": f"Planted+password/9xKq2{_OWN}",
    "WRONG_PASSWORD": f"Planted+wrong/password/7mW{_OWN}",
    "KEY_PASSPHRASE": f"Planted correct horse 3bT {_OWN}",
    "WRONG_PASSPHRASE": f"Planted wrong horse 5nR {_OWN}",
    "GATEWAY_KEY": f"Planted-gateway-key-8vL{_OWN}",
    "BACKEND_KEY": f"Planted-backend-key-4dJ{_OWN}",
    "REDIS_SECRET": f"Planted-redis-secret-6hC{_OWN}",
}
NOBODY_ID = 65534
PAUSE_S = 0.02  # between two looks at all processes, which are shorter than the life of any that is looked for


def forms(secret: str) -> set[bytes]:
    """As it may have been written on its way."""
    plain = secret.encode()
    encoded = {base64.b64encode(b"x" * shift + plain)[4 * (shift > 0) : -4] for shift in range(3)}
    return {plain, quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode(), *encoded}


NEEDLES = {form: name for name, secret in SECRETS.items() for form in forms(secret)}


def found_in(data: bytes) -> set[str]:
    """The names of the secrets that stand in it."""
    return {name for form, name in NEEDLES.items() if form in data}


def test_this_test_would_find_one() -> None:
    for name, secret in SECRETS.items():
        assert found_in(f"x{secret}x".encode()) == {name}
        for prefix in ("", "p:", "me:"):
            assert found_in(base64.b64encode(f"{prefix}{secret} and more".encode())) == {name}


class ProcessScan:
    """Lists the processes of this machine that have started since it was made. A look at all the others, again and
    again, would take most of a core."""

    def __init__(self) -> None:
        self._older = set(os.listdir("/proc"))

    def folders(self) -> list[str]:
        """Their folders in /proc."""
        return [f"/proc/{name}" for name in os.listdir("/proc") if name not in self._older and name.isdigit()]


class Arguments:
    """Looks at the arguments of all processes that start on this machine, again and again, for as long as the block
    runs."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        self.looks = 0
        self.programs: set[str] = set()
        self._scan = ProcessScan()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        seen: set[bytes] = set()
        while not self._over.wait(PAUSE_S):
            for folder in self._scan.folders():
                with contextlib.suppress(OSError), open(f"{folder}/cmdline", "rb") as file:
                    arguments = file.read()
                    if arguments in seen:
                        continue
                    seen.add(arguments)
                    self.programs.add(os.path.basename(arguments.split(b"\0")[0].decode(errors="replace")))
                    self.found |= {(name, arguments.decode(errors="replace")) for name in found_in(arguments)}
            self.looks += 1

    def __enter__(self) -> Arguments:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(20)


@dataclass(frozen=True)
class Planted(Gpumesh):
    """The command with the secrets in its environment; all that it ever said is kept."""

    said: list[str] = field(default_factory=list)

    def environment(self, **changes: str) -> dict[str, str]:
        return {**super().environment(), **SECRETS, **changes}

    async def __call__(self, *arguments: str, stdin: str | None = None, code: int | None = 0) -> CommandResult:
        ended = await super().__call__(*arguments, stdin=stdin, code=code)
        self.said.append(f"$ gpumesh {' '.join(arguments)}\n{ended}")
        return ended

    def left_behind(self) -> Iterator[Path]:
        """Every file that it wrote, wherever."""
        for folder in (self.home, self.runtime):
            yield from (path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Planted]:
    home = tmp_path / "home"
    home.mkdir()
    # Open to all, as /tmp is: it is gpumesh's own folder in it that has to keep others out.
    runtime = Path(tempfile.mkdtemp(prefix="gm-", dir="/tmp"))
    runtime.chmod(0o755)
    command = Planted(tmp_path / "mesh.yaml", home, runtime, warm=True)
    yield command
    left = command.processes()
    command.kill_all()
    shutil.rmtree(runtime, ignore_errors=True)
    assert not left, f"processes were left: {left}"


@dataclass(frozen=True)
class Hosts:
    """One that takes a password, and one that takes a key with a passphrase."""

    by_password: SimHost
    by_key: Sshd
    locked: Path
    known_hosts: Path
    backend_port: int

    def node(self, name: str, transport: TransportKind, **ssh: Any) -> dict[str, Any]:
        usual = {
            "host": "127.0.0.1",
            "known_hosts": str(self.known_hosts),
            "agent": False,
            "transport": transport.value,
        }
        backend = {"port": self.backend_port, "api_key_env": "BACKEND_KEY"}
        return {"name": name, "ssh": {**usual, **ssh}, "backend": backend}

    def nodes(self) -> list[dict[str, Any]]:
        made = []
        for transport in TransportKind:
            password = {"port": self.by_password.ssh_port, "user": "root"}
            key = {"port": self.by_key.port, "user": self.by_key.spec().user, "identity_file": str(self.locked)}
            kind = transport.value
            made += [
                self.node(f"password-{kind}", transport, password_env="HOST_PASSWORD", **password),
                self.node(f"key-{kind}", transport, passphrase_env="KEY_PASSPHRASE", **key),
                self.node(f"wrong-password-{kind}", transport, password_env="WRONG_PASSWORD", **password),
                self.node(f"wrong-passphrase-{kind}", transport, passphrase_env="WRONG_PASSPHRASE", **key),
            ]
        for node in made:  # the simulated host's backend has a port of its own
            if "password-" in node["name"]:
                node["backend"]["port"] = self.by_password.profile.backend_port
        return made


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[Hosts]:
    host_key = keys.new_key()
    profile = quick_host("sim", password=SECRETS["HOST_PASSWORD"], slots=8)
    async with SimHost(HostStart(profile, host_key, ())) as by_password, Sshd(tmp_path / "sshd") as by_key:
        locked = keygen(tmp_path / "locked", passphrase=SECRETS["KEY_PASSPHRASE"])
        by_key.authorized_keys.write_text(locked.with_suffix(".pub").read_text())
        assert by_password.ssh_port is not None
        known = tmp_path / "known_hosts"
        line = keys.known_hosts_line(host_key, by_password.ssh_port)
        known.write_text(f"{line}\n{by_key.known_hosts.read_text()}")
        yield Hosts(by_password, by_key, locked, known, by_password.backend_port)


def write(planted: Planted, nodes: list[dict[str, Any]]) -> None:
    document = {
        "version": 1,
        "name": "planted",
        "gateway": {"listen": "127.0.0.1:0", "api_key_env": "GATEWAY_KEY", "default_model": MODEL},
        "redis": {"url": "redis://127.0.0.1:1/0", "password_env": "REDIS_SECRET"},
        "nodes": nodes,
    }
    planted.config.write_text(json.dumps(document, indent=1))


async def test_secrets_are_nowhere(planted: Planted, hosts: Hosts) -> None:
    write(planted, hosts.nodes())
    good = [f"{what}-{kind.value}" for what in ("password", "key") for kind in TransportKind]
    wrong = [f"wrong-{what}-{kind.value}" for what in ("password", "passphrase") for kind in TransportKind]
    with Arguments() as arguments:
        await planted("config", "check", code=None)
        for extra in ([], ["--json"]):
            await planted("config", "show", *extra, code=None)
        await replace(planted, warm=False)("up", "-d", "--verbose", code=None)  # the installed script

        async def states() -> dict[str, str]:
            status = (await planted("status", "--json")).json()
            return {node["name"]: node["tunnel"]["state"] for node in status["nodes"]}

        found: dict[str, str] = {}
        for _ in range(60):
            found = await states()
            if all(found[name] == "up" for name in good) and all(found[name] == "failed" for name in wrong):
                break
            await asyncio.sleep(0.25)
        assert {name: found[name] for name in good} == dict.fromkeys(good, "up")
        assert {name: found[name] for name in wrong} == dict.fromkeys(wrong, "failed")
        for name in good:  # the secrets were used, so they could have been shown
            assert (await planted("exec", name, "--", "hostname")).out
        for name in wrong:
            ended = await planted("exec", name, "--", "hostname", code=None)
            assert ended.code != 0
        await planted("--verbose", "status", code=None)
        for command in (["status", "--check"], ["audit"], ["audit", "--json"], ["models"], ["env"], ["logs"]):
            await planted(*command, code=None)
        await planted("run", "-m", MODEL, "hello", code=None)
        await planted("run", "--node", wrong[0], "-m", MODEL, "hello", code=None)
        planted.said.extend(await gateway_says(planted))
        sockets = private_sockets(planted)
        await others_are_kept_out(planted, sockets)
        await planted("down")
        # A mesh of this process's own, whose every login fails; and one that is not told a secret that it needs.
        write(planted, [node for node in hosts.nodes() if node["name"] in wrong])
        for name in wrong:
            ended = await planted("--verbose", "exec", name, "--", "true", code=None)
            assert ended.code not in (0, None)
        await planted("trust", "--yes", wrong[0], code=None)
    assert arguments.looks > 20
    assert {"ssh", "gpumesh tunnel key-openssh"} <= arguments.programs, "it looked while they ran"
    assert not arguments.found
    for said in planted.said:
        assert not found_in(said.encode()), said
    files = list(planted.left_behind())
    assert any("log" in str(path) for path in files), "there is a log to look through"
    for path in files:
        assert not found_in(path.read_bytes()), path


async def gateway_says(planted: Planted) -> list[str]:
    """With the right key, with a wrong one, and with none."""
    url = (await planted("status", "--json")).json()["gateway"]["url"]
    said = []
    async with loopback_client(base_url=url, timeout=20) as client:
        for key in (SECRETS["GATEWAY_KEY"], "not the key", None):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            for path in ("/", "/healthz", "/metrics", "/mesh/status", "/api/tags", "/v1/models", "/nowhere"):
                answer = await client.get(path, headers=headers)
                said.append(f"{path} {answer.status_code} {answer.headers} {answer.text}")
            for path in ("/api/chat", "/v1/chat/completions"):
                body = {"model": MODEL, "stream": False, "messages": [{"role": "user", "content": "hello"}]}
                answer = await client.post(path, headers=headers, json=body)
                said.append(f"{path} {answer.status_code} {answer.headers} {answer.text}")
                if key == SECRETS["GATEWAY_KEY"]:
                    assert answer.status_code == 200
                else:
                    assert answer.status_code == 401
    return said


def private_sockets(planted: Planted) -> list[Path]:
    """All that lie in the runtime folder, each checked: 0600, in folders of 0700."""
    found = []
    for path in (planted.runtime / "gpumesh").rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISSOCK(mode):
            assert stat.S_IMODE(mode) == 0o600, path
            found.append(path)
        elif stat.S_ISDIR(mode):
            assert stat.S_IMODE(mode) == 0o700, path
        else:
            assert not stat.S_IMODE(mode) & 0o077, path
    assert stat.S_IMODE((planted.runtime / "gpumesh").stat().st_mode) == 0o700
    masters = {path.parent for path in found if path.name == "c"}
    assert len(masters) >= 2, f"the control sockets of both openssh nodes, among {found}"
    assert any(path.name == "control.sock" for path in found), f"the mesh's own, among {found}"
    assert not any(path.name == "ask" for path in found), "who answers ssh's questions is gone after the login"
    return found


INTRUDER = """
import os, socket, sys
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
for path in sys.argv[2:]:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(path)
        print("CONNECTED", path)
    except OSError as error:
        print(type(error).__name__)
    sock.close()
try:
    print("LISTED", os.listdir(os.path.dirname(sys.argv[2])))
except OSError as error:
    print(type(error).__name__)
"""


async def others_are_kept_out(planted: Planted, sockets: list[Path]) -> None:
    """Another user of this machine: a process that has become one."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    for path in sockets:  # we ourselves get through: it is the user that makes the difference
        with socket.socket(socket.AF_UNIX) as ours:
            ours.settimeout(10)
            ours.connect(str(path))
    intruder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INTRUDER, str(NOBODY_ID), *map(str, sockets), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(intruder.communicate(), 30)
    assert out.decode().split() == ["PermissionError"] * (len(sockets) + 1)


async def test_a_secret_in_the_file_itself_is_refused_without_repeating_it(planted: Planted) -> None:
    planted.config.write_text(
        f"nodes: [{{name: a, ssh: {{host: h, password: {SECRETS['HOST_PASSWORD']!r}}}}}]\n"
        f"redis: {{url: 'redis://:{SECRETS['REDIS_SECRET']}@127.0.0.1:6379/0'}}\n"
        f"gateway: {{api_key: {SECRETS['GATEWAY_KEY']}}}\n"
    )
    for command in (["config", "check"], ["config", "show"], ["status"], ["status", "--json"], ["up", "-d"]):
        ended = await planted(*command, code=ExitCode.USAGE)
        assert not found_in(str(ended).encode()), ended


async def test_an_unset_variable_is_named(planted: Planted, hosts: Hosts) -> None:
    node = hosts.node("a", TransportKind.SSHTUNNEL, port=hosts.by_key.port, password_env="NEVER_SET_BY_ANYBODY")
    write(planted, [node])
    ended = await planted("exec", "a", "--", "true", code=None)
    assert ended.code not in (0, None)
    assert "NEVER_SET_BY_ANYBODY" in ended.err
    await wait_until(lambda: not planted.processes(), "all its processes ended")


class Environments:
    """Looks at the environments of all processes of a mesh, again and again, for as long as the block runs. ``holders``
    are the arguments of those that had a secret there, ``others`` of those that had none."""

    def __init__(self, mark: bytes) -> None:
        self.holders: set[str] = set()
        self.others: set[str] = set()
        self._mark = mark
        self._scan = ProcessScan()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(PAUSE_S):
            for folder in self._scan.folders():
                with contextlib.suppress(OSError):
                    # Before and after: a process that becomes another program between the two is neither.
                    before = Path(folder, "cmdline").read_bytes()
                    environment = Path(folder, "environ").read_bytes()
                    if self._mark in environment and before == Path(folder, "cmdline").read_bytes():
                        place = self.holders if found_in(environment) else self.others
                        place.add(before.replace(b"\0", b" ").decode(errors="replace").strip())

    def __enter__(self) -> Environments:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(20)


def telling(folder: Path, name: str, prints: str) -> Path:
    """A program that adds its environment to a file beside it, and then prints something."""
    program = folder / name
    program.write_text(f"#!/bin/sh\nenv >> {folder}/{name}.env\necho '{prints}'\n")
    program.chmod(0o755)
    return program


async def test_no_program_that_it_starts_has_them_in_its_environment(
    planted: Planted, hosts: Hosts, tmp_path: Path
) -> None:
    """The mesh itself reads them there. Its tunnels' processes, ssh, who answers ssh's questions, nvidia-smi, and the
    user's own commands have none. What those need for themselves they have."""
    programs = tmp_path / "programs"
    programs.mkdir()
    address = telling(programs, "where", f"127.0.0.1 {hosts.by_key.port}")
    telling(programs, "nvidia-smi", "")
    ssh_config = planted.home / ".ssh" / "config"
    ssh_config.parent.mkdir(mode=0o700)
    matched = telling(programs, "matched", "")
    ssh_config.write_text(f'Match exec "{matched}"\n  ServerAliveInterval 7\n')
    nodes = [node for node in hosts.nodes() if not node["name"].startswith("wrong")]
    found = hosts.node(
        "found",
        TransportKind.OPENSSH,
        user=hosts.by_key.spec().user,
        identity_file=str(hosts.locked),
        passphrase_env="KEY_PASSPHRASE",
    )
    del found["ssh"]["host"]
    found["address_from"] = {"command": [str(address)]}
    wrong = {"password_env": "WRONG_PASSWORD", "passphrase_env": "WRONG_PASSPHRASE"}
    named = hosts.node("named", TransportKind.OPENSSH, alias="nowhere.invalid", **wrong)
    del named["ssh"]["host"]
    here = {"name": "here", "backend": {"url": f"http://127.0.0.1:{hosts.backend_port}", "api_key_env": "BACKEND_KEY"}}
    write(planted, [*nodes, found, named, here])
    variables = {"RUNPOD_API_KEY": "the provider's own", "PATH": f"{programs}:{os.environ['PATH']}"}
    with Environments(planted.mark) as environments:
        process = await asyncio.create_subprocess_exec(
            *(str(GPUMESH), "up"),
            env=planted.environment(**variables),
            cwd=planted.home,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(90):
                wanted = {node["name"] for node in [*nodes, found, here]}
                while wanted:
                    status = (await planted("status", "--json", code=None)).json()
                    up = {node["name"] for node in status["nodes"] if node["tunnel"]["state"] == "up"}
                    wanted -= up
                    await asyncio.sleep(0.1)
                for node in [*nodes, found]:
                    assert (await planted("exec", node["name"], "--", "hostname")).out
                while not (programs / "nvidia-smi.env").exists():
                    await asyncio.sleep(0.05)
        finally:
            process.terminate()
            await process.wait()
    for name in ("where", "nvidia-smi", "matched"):
        left = (programs / f"{name}.env").read_text()
        assert not found_in(left.encode()), f"{name}: {left}"
        assert not any(variable in left for variable in SECRETS), f"{name}: {left}"
        assert name == "matched" or "RUNPOD_API_KEY=the provider's own" in left, name  # that one is run by `exec` too
    commands = (str(GPUMESH), "gpumesh.daemon")
    assert [arguments for arguments in environments.holders if not any(own in arguments for own in commands)] == []
    for part in ("gpumesh tunnels", "gpumesh tunnel key-sshtunnel", "gpumesh tunnel password-openssh", "ssh -"):
        assert any(arguments.startswith(part) for arguments in environments.others), part
