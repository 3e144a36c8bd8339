"""Simulated hosts in the test's own process, and the installed command with a mesh.yaml that names them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpumesh.lab import keys, profile
from gpumesh.lab.host import HostStart, SimHost
from gpumesh.lab.profile import HostProfile
from tests.http_clients import loopback_client
from tests.real.command import Gpumesh

MODEL = "qwen2.5:7b"


@dataclass(frozen=True)
class SimulatedMesh:
    """``gpumesh`` is the command, ``hosts`` are those that it reaches. ``gateway_url``: of a ``background_mesh``."""

    gpumesh: Gpumesh
    hosts: Mapping[str, SimHost]
    ssh: Mapping[str, Any]
    gateway_url: str = ""

    def node(self, name: str, **changes: Any) -> dict[str, Any]:
        """A host's entry in mesh.yaml."""
        host = self.hosts[name]
        if host.ssh_port is None:
            return {"name": name, "backend": {"url": f"http://127.0.0.1:{host.backend_port}"}, **changes}
        return {
            "name": name,
            "ssh": {"host": keys.LOOPBACK_HOST, "port": host.ssh_port},
            "backend": {"port": host.profile.backend_port},
            **changes,
        }

    async def wait_all_up(self) -> None:
        """Waits until the mesh in the background finds all its nodes up.

        The hosts live in the event loop of their module. While a test with a loop of its own runs, they answer nothing,
        and the mesh takes them for dead."""
        async with loopback_client(base_url=self.gateway_url) as client:
            while True:
                document = (await client.get("/mesh/status")).json()
                if all(node["backend"]["state"] == "up" for node in document["nodes"]):
                    return
                await asyncio.sleep(0.1)

    def write(self, nodes: Sequence[Mapping[str, Any]] | None = None, **gateway: Any) -> Path:
        """Writes mesh.yaml (JSON is YAML) with all hosts, or with ``nodes``."""
        document = {
            "version": 1,
            "name": "tested",
            "gateway": {"listen": "127.0.0.1:0", "default_model": MODEL, **gateway},
            "defaults": {"ssh": dict(self.ssh)},
            "nodes": [self.node(name) for name in self.hosts] if nodes is None else list(nodes),
        }
        self.gpumesh.config.write_text(json.dumps(document, indent=1))
        return self.gpumesh.config


@contextlib.contextmanager
def isolated_command(folder: Path) -> Iterator[Gpumesh]:
    """The command with a home of its own and no mesh.yaml yet. Fails if processes are left at the end."""
    home = folder / "home"
    home.mkdir()
    runtime = Path(tempfile.mkdtemp(prefix="gm-", dir="/tmp"))  # short: it holds a Unix socket
    made = Gpumesh(folder / "mesh.yaml", home, runtime, warm=True)
    try:
        yield made
        remaining = made.processes()
    finally:
        made.kill_all()
        shutil.rmtree(runtime, ignore_errors=True)
    assert not remaining, f"processes were left: {remaining}"


@contextlib.asynccontextmanager
async def simulated_mesh(gpumesh: Gpumesh, *profiles: HostProfile) -> AsyncIterator[SimulatedMesh]:
    """The hosts, and a mesh.yaml of all of them."""
    folder = gpumesh.config.parent
    identity, known_hosts = folder / "id_ed25519", folder / "known_hosts"
    visitor = keys.new_key()
    identity.touch(mode=0o600)
    identity.write_text(visitor)
    hosts: dict[str, SimHost] = {}
    lines = []
    async with contextlib.AsyncExitStack() as stack:
        for host_profile in profiles:
            host_key = keys.new_key()
            host = SimHost(HostStart(host_profile, host_key, (keys.public_key_line(visitor),)))
            hosts[host_profile.name] = await stack.enter_async_context(host)
            if host.ssh_port is not None:
                lines.append(keys.known_hosts_line(host_key, host.ssh_port))
        known_hosts.write_text("".join(f"{line}\n" for line in lines))
        ssh = {"user": "root", "identity_file": str(identity), "known_hosts": str(known_hosts), "agent": False}
        made = SimulatedMesh(gpumesh, hosts, ssh)
        made.write()
        yield made


@contextlib.asynccontextmanager
async def background_mesh(folder: Path, *profiles: HostProfile) -> AsyncIterator[SimulatedMesh]:
    """The hosts, and a mesh of all of them that runs in the background: for the tests of a module that only ask it, or
    that change what no other of them looks at. A mesh of its own would cost each of them a second of CPU. Each of them
    must first ``wait_all_up``."""
    with isolated_command(folder) as gpumesh:
        async with simulated_mesh(gpumesh, *profiles) as made:
            await gpumesh("up", "-d")
            document = (await gpumesh("status", "--json")).json()
            yield replace(made, gateway_url=document["gateway"]["url"])
            await gpumesh("down")


def quick_host(name: str, **changes: Any) -> HostProfile:
    """A host with quick, short answers, so that tests are short."""
    usual: dict[str, Any] = {"tokens_per_s": 400.0, "load_s": 0.0, "answer_tokens": (6, 12), "slots": 2, "pull_s": 0.05}
    return profile.make_host(name, **{**usual, **changes})
