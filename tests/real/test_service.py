"""`gpumesh service` under a real systemd: after `kill -9` the mesh comes back with its tunnels, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import stat
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpumesh.daemon.run_record import COUNT_INTERVAL_S
from tests.cli.meshes import SimulatedMesh, isolated_command, quick_host, simulated_mesh
from tests.http_clients import loopback_client
from tests.prerequisites import needs
from tests.real.command import GPUMESH, CommandResult
from tests.real.systemd import UserSystemd, user_systemd

KEY = "planted-key-of-the-gateway"
BACK_WITHIN_S = 5.0
PROMPT = {"model": "qwen2.5:7b", "prompt": "Hello", "stream": False}

pytestmark = [needs("systemd", "ssh"), pytest.mark.real, pytest.mark.slow]


@dataclass(frozen=True)
class ServiceMesh:
    """``url``: of the gateway, whose port is the same after each start."""

    mesh: SimulatedMesh
    systemd: UserSystemd
    url: str

    async def command(self, *arguments: str, code: int = 0) -> CommandResult:
        """Runs `gpumesh service …` where systemd can be reached."""
        return await self.systemd(str(GPUMESH), "service", *arguments, code=code)

    async def status(self) -> dict[str, Any]:
        document: dict[str, Any] = (await self.command("status", "--json")).json()
        return document

    @property
    def unit(self) -> Path:
        return self.mesh.gpumesh.home / ".config" / "systemd" / "user" / "gpumesh.service"

    @property
    def variables_file(self) -> Path:
        return self.mesh.gpumesh.home / ".config" / "gpumesh" / "secrets.env"

    def main_process(self) -> int:
        """The pid of the service's mesh, as the test sees it. The service sees another."""
        for pid in self.mesh.gpumesh.processes():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"/gpumesh\0up\0--quiet\0"):
                    return pid
        raise AssertionError("no mesh runs")

    async def wait_served(self) -> None:
        """Returns when both nodes behind SSH have answered a prompt through the gateway."""
        async with asyncio.timeout(30), loopback_client() as client:
            for node in ("alpha", "beta"):
                while True:
                    with contextlib.suppress(httpx.TransportError):
                        answer = await client.post(f"{self.url}/api/generate", headers=to_node(node), json=PROMPT)
                        if answer.status_code == 200:
                            break
                    await asyncio.sleep(0.02)


def to_node(node: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}", "X-GPUMesh-Node": node}


@contextlib.asynccontextmanager
async def service_mesh(folder: Path) -> AsyncIterator[ServiceMesh]:
    """A node of each transport, a slow one, and a systemd in whose shell the gateway's key is set."""
    slow = quick_host("slow", ssh=False, tokens_per_s=4.0, answer_tokens=(400, 400))
    with isolated_command(folder) as gpumesh:
        async with simulated_mesh(gpumesh, quick_host("alpha"), quick_host("beta"), slow) as mesh:
            beta = mesh.node("beta")
            nodes = [mesh.node("alpha"), {**beta, "ssh": {**beta["ssh"], "transport": "openssh"}}, mesh.node("slow")]
            with socket.create_server(("127.0.0.1", 0)) as server:
                listen = f"127.0.0.1:{server.getsockname()[1]}"
            mesh.write(nodes, listen=listen, api_key_env="MESH_KEY", reload="manual")
            async with user_systemd(gpumesh.environment(MESH_KEY=KEY)) as systemd:
                yield ServiceMesh(mesh, systemd, f"http://{listen}")


@pytest.mark.exclusive
async def test_kill_9_under_systemd(tmp_path: Path) -> None:
    async with service_mesh(tmp_path) as service, loopback_client() as client:
        installed = await service.command("install", "--save-variables")
        assert (
            f"the service gpumesh keeps the mesh of {service.mesh.gpumesh.config} up, with {service.unit}: "
            in installed.out
        )
        assert "`journalctl --user -u gpumesh` and `gpumesh logs` show its log" in installed.out
        assert "`loginctl enable-linger`" in installed.out
        assert KEY not in service.unit.read_text() + installed.out
        assert service.variables_file.read_text().endswith(f'MESH_KEY="{KEY}"\n')
        assert stat.S_IMODE(service.variables_file.stat().st_mode) == 0o600
        await service.wait_served()
        verified = await service.systemd("systemd-analyze", "--user", "verify", str(service.unit))
        assert verified.out + verified.err == "", "systemd has nothing to say against it"

        stream_body: dict[str, Any] = {**PROMPT, "stream": True}
        async with client.stream(
            "POST", f"{service.url}/api/generate", headers=to_node("slow"), json=stream_body
        ) as cut:
            pieces = cut.aiter_raw()
            await anext(pieces)
            await asyncio.sleep(3 * COUNT_INTERVAL_S)  # the record has it by then
            before = service.mesh.gpumesh.processes()
            main = service.main_process()
            assert len([pid for pid in before if not is_systemd(pid)]) > 4, "the mesh, its workers, and ssh"
            killed_at = time.monotonic()
            os.kill(main, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                _ = [piece async for piece in pieces]
        await service.wait_served()
        back_after = time.monotonic() - killed_at
        assert back_after < BACK_WITHIN_S, f"back after {back_after:.1f} s\n{service.mesh.gpumesh.logs()}"
        left = {pid for pid in before & service.mesh.gpumesh.processes() if not is_systemd(pid)}
        assert not left, f"of the killed mesh {left} were left"

        status = await service.status()
        assert (status["active"], status["restarts"], status["origin"]) == (True, 1, "ours")
        assert (status["variables"], status["missing_variables"], status["up_to_date"]) == (["MESH_KEY"], [], True)
        log = (await service.mesh.gpumesh("logs")).out
        assert re.search(r"the mesh before this one \(pid \d+\) ended without stopping .*1 of qwen2.5:7b on slow", log)

        mesh_yaml = service.mesh.gpumesh.config.read_text()
        service.mesh.gpumesh.config.write_text(mesh_yaml.replace('"slow"', '"fast"'))
        await service.systemd("systemctl", "--user", "reload", "gpumesh")
        shown = (await service.mesh.gpumesh("status", "--json")).json()
        assert {node["name"] for node in shown["nodes"]} == {"alpha", "beta", "fast"}
        assert (await service.status())["restarts"] == 1, "it is the same process"
        service.mesh.gpumesh.config.write_text("nodes: [")
        await service.systemd("systemctl", "--user", "reload", "gpumesh", code=1)
        service.mesh.gpumesh.config.write_text(mesh_yaml)

        await service.mesh.gpumesh("down")
        await asyncio.sleep(1.0)  # longer than systemd would wait before it starts a service again
        status = await service.status()
        assert (status["active"], status["state"]) == (False, "inactive (dead)")
        await service.command("install")
        assert (await service.status())["active"], "installed again, without a change, it is started"
        service.unit.write_text(service.unit.read_text().replace("LimitNOFILE=65536", "LimitNOFILE=4096"))
        refused = await service.command("install", code=2)
        assert f"{service.unit} was changed since `gpumesh service install` wrote it" in refused.err
        assert "LimitNOFILE=4096" in service.unit.read_text()
        await service.command("uninstall", code=2)
        removed = await service.command("uninstall", "--force")
        assert "stopped the service gpumesh" in removed.out
        assert not service.unit.exists()
        assert not {pid for pid in service.mesh.gpumesh.processes() if not is_systemd(pid)}


def is_systemd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() in ("systemd", "(sd-pam)", "bash", "unshare")
    except OSError:  # it has ended
        return True
