"""A whole mesh in this process, with a mesh.yaml that tests rewrite, over simulated hosts with and without SSH."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from gpumesh.config.changed_file import read_snapshot
from gpumesh.config.live_changes import ReloadReport
from gpumesh.daemon.mesh_process import run_mesh
from gpumesh.daemon.paths import MeshPaths
from gpumesh.daemon.sessions.local_session import LocalSession
from gpumesh.daemon.shutdown import Shutdown
from gpumesh.daemon.up_options import UpOptions, apply_options
from gpumesh.lab import profile
from gpumesh.lab.profile import HostProfile, ModelProfile
from gpumesh.mesh.mesh import Mesh
from gpumesh.state import Finding
from tests.cli.meshes import SimulatedMesh, isolated_command, simulated_mesh
from tests.real.command import Gpumesh

MODEL = "m:latest"
CHECK_INTERVAL_S = 0.05


def streaming_host(name: str, *, tokens: int = 24, rate: float = 60.0, **changes: Any) -> HostProfile:
    model = ModelProfile(MODEL, resident=True)
    usual: dict[str, Any] = {"prefill_tokens_per_s": None, "load_s": 0.0, "slots": 32}
    return profile.make_host(
        name, models=(model,), tokens_per_s=rate, answer_tokens=(tokens, tokens), **{**usual, **changes}
    )


@dataclass
class ReloadedMesh:
    """``session`` is on the running mesh, ``lab`` has the hosts and writes the file."""

    session: LocalSession
    lab: SimulatedMesh
    paths: MeshPaths

    @property
    def mesh(self) -> Mesh:
        return self.session.mesh

    @property
    def url(self) -> str:
        return self.mesh.gateway.url or ""

    @property
    def names(self) -> list[str]:
        return [node.name for node in self.mesh.fleet]

    def write(self, *nodes: Mapping[str, Any], more: Mapping[str, Any] | None = None, **gateway: Any) -> None:
        """Writes mesh.yaml, with ``more`` sections. Without ``nodes``, all hosts are nodes."""
        self.lab.write(nodes or None, **{"reload": self.mesh.topology.gateway.reload.value, **gateway})
        if more:
            document = json.loads(self.paths.config.read_text())
            self.paths.config.write_text(json.dumps({**document, **more}, indent=1))

    async def reload(self, *nodes: Mapping[str, Any], **more: Any) -> ReloadReport:
        """Writes mesh.yaml, and reloads it."""
        self.write(*nodes, **more)
        return await self.session.reload()

    def findings(self) -> dict[str, Finding]:
        return {finding.code: finding for finding in self.mesh.snapshot().findings}

    def log(self) -> list[str]:
        return [json.loads(line)["message"] for line in self.paths.log.read_text().splitlines()]


@asynccontextmanager
async def running_mesh(
    folder: Path, *profiles: HostProfile, options: UpOptions | None = None, reload: str = "manual"
) -> AsyncIterator[ReloadedMesh]:
    """A mesh of these hosts, as `up` runs it, until the end of the block. It looks at its file very often."""
    options = options or UpOptions()
    folder.mkdir(exist_ok=True)
    with isolated_command(folder) as command:
        async with simulated_mesh(command, *profiles) as lab:
            lab.write(reload=reload)
            paths = _paths(command, folder)
            snapshot = read_snapshot(paths.config)
            topology = apply_options(snapshot.topology, options)
            async with run_mesh(
                topology,
                paths,
                gateway=True,
                shutdown=Shutdown(),
                snapshot=snapshot,
                options=options,
                file_check_interval_s=CHECK_INTERVAL_S,
            ) as session:
                await session.wait_first_report(20.0)
                yield ReloadedMesh(session, lab, paths)


def _paths(command: Gpumesh, folder: Path) -> MeshPaths:
    paths = MeshPaths(command.config, command.runtime / "m", folder / "logs" / "m.jsonl")
    paths.create_folder()
    return paths


class Clients:
    """Clients that stream one answer after the other, each of which must be whole. ``answers`` counts them; ``nodes``
    are those that have served."""

    def __init__(self, url: str, count: int) -> None:
        self._url = url
        self._count = count
        self._progress = asyncio.Condition()
        self._stopped = False
        self.tokens = self.answers = 0
        self.faults: list[str] = []
        self.nodes: set[str] = set()

    @asynccontextmanager
    async def streaming(self) -> AsyncIterator[Clients]:
        async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as group:
            for number in range(self._count):
                group.create_task(self._stream(http, number))
            try:
                yield self
            finally:
                self._stopped = True

    async def wait_tokens(self, count: int) -> None:
        """Waits until so many more tokens have come."""
        wanted = self.tokens + count
        async with asyncio.timeout(60), self._progress:
            await self._progress.wait_for(lambda: self.tokens >= wanted or bool(self.faults))

    async def _stream(self, http: aiohttp.ClientSession, number: int) -> None:
        prompt = {"role": "user", "content": f"Question {number}: why?"}
        first_text = None
        while not self._stopped and not self.faults:
            body = {"model": MODEL, "messages": [prompt]}
            async with http.post(f"{self._url}/api/chat", json=body) as response:
                if response.status != 200:
                    self.faults.append(f"{number}: {response.status} {await response.text()}")
                    break
                self.nodes.add(response.headers["X-GPUMesh-Node"])
                text = await self._read(number, response)
            first_text = first_text or text
            if text != first_text:
                self.faults.append(f"{number}: {text!r} is not {first_text!r}")
            self.answers += 1
        async with self._progress:
            self._progress.notify_all()

    async def _read(self, number: int, response: aiohttp.ClientResponse) -> str:
        """The text of a stream."""
        pieces, is_done = [], False
        async for line in response.content:
            frame = json.loads(line)
            if "error" in frame:
                self.faults.append(f"{number}: {frame}")
                break
            pieces.append(frame["message"]["content"])
            is_done = is_done or frame["done"]
            self.tokens += 1
            async with self._progress:
                self._progress.notify_all()
        if not is_done:
            self.faults.append(f"{number}: cut after {''.join(pieces)!r}")
        return "".join(pieces)
