"""While clients stream, mesh.yaml is changed at random, and broken: no request fails, and none is cut."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gpumesh.errors import ConfigError
from tests.daemon.reload.running import Clients, ReloadedMesh, running_mesh, streaming_host
from tests.tunnels.polling import wait_until

CLIENTS = 16
HOSTS = [
    streaming_host("one"),
    streaming_host("two"),
    streaming_host("three", ssh=False),
    streaming_host("four", ssh=False),
]
BROKEN = ("nodes: [", "nodes: []\n", "nodes: [{name: one, sssh: {}}]\n", "\x00", "")


class RandomFile:
    """A mesh.yaml that changes by one random step after the other."""

    def __init__(self, running: ReloadedMesh, random: Random) -> None:
        self._running = running
        self._random = random
        self._changes: dict[str, dict[str, Any]] = {host.name: {} for host in HOSTS}
        self._absent: set[str] = set()
        self._gateway: dict[str, Any] = {}
        self._models: dict[str, Any] = {}

    async def take_step(self) -> str:
        """Changes the file and reloads it. Returns what was done."""
        random = self._random
        present = [name for name in self._changes if name not in self._absent]
        enabled = [name for name in present if self._changes[name].get("enabled", True)]
        name = random.choice(present)
        step = random.choice(["add", "remove", "cheap", "ssh", "backend", "enabled", "gateway", "models", "broken"])
        match step:
            case "broken":
                self._running.paths.config.write_text(random.choice(BROKEN))
                with pytest.raises(ConfigError):
                    await self._running.session.reload()
                return step
            case "add" if self._absent:
                self._absent.discard(name := random.choice(sorted(self._absent)))
            case "remove" if len(enabled) > 1:
                self._absent.add(name := random.choice(enabled))
            case "enabled" if len(enabled) > 1 or name not in enabled:
                self._changes[name]["enabled"] = name not in enabled
            case "ssh" if self._running.lab.hosts[name].ssh_port is not None:
                self._changes[name]["keepalive"] = f"{random.randint(1, 100)}s"
            case "backend":
                self._changes[name]["spare"] = not self._changes[name].get("spare", False)
            case "gateway":
                self._gateway = {"policy": random.choice(["adaptive", "round-robin", "least-loaded", "power-of-two"])}
            case "models":
                self._models = {"m": {"aliases": [f"alias-{random.randint(1, 9)}"]}}
            case _:
                self._changes[name] |= {"weight": random.randint(1, 9), "tier": random.randint(1, 3)}
        await self._running.reload(
            *(self._entry(name) for name in self._changes if name not in self._absent),
            more={"models": self._models},
            **self._gateway,
        )
        return f"{step} {name}"

    def _entry(self, name: str) -> dict[str, Any]:
        changes = dict(self._changes[name])
        keepalive, has_spare = changes.pop("keepalive", None), changes.pop("spare", False)
        entry = self._running.lab.node(name, **changes)
        if keepalive is not None:
            entry["ssh"] = {**entry["ssh"], "keepalive": keepalive}
        if has_spare:
            url = entry["backend"].get("url") or f"http://127.0.0.1:{entry['backend']['port']}"
            entry["backend"] = {"urls": [url, "http://127.0.0.1:1"]}
        return entry


async def stream_through_reloads(folder: Path, *, seed: int, count: int) -> None:
    """Reloads so many times, while answers stream."""
    async with running_mesh(folder, *HOSTS) as running:
        steps: list[str] = []
        file = RandomFile(running, Random(seed))
        clients = Clients(running.url, CLIENTS)
        async with clients.streaming():
            await clients.wait_tokens(CLIENTS)
            for _ in range(count):
                steps.append(await file.take_step())
                await clients.wait_tokens(2 * CLIENTS)
                assert not clients.faults, (steps, clients.faults)
        assert not clients.faults, (steps, clients.faults)
        assert clients.answers >= CLIENTS  # each client has its last answer whole
        counters = running.mesh.request_counters
        assert (counters.failed, counters.cancelled, counters.in_flight) == (0, 0, 0)
        await wait_until(lambda: not running.mesh.fleet.leaving, "all nodes that left are closed")
        document = json.loads(running.paths.config.read_text() or "{}") if steps[-1] != "broken" else {}
        if document:
            assert running.names == [node["name"] for node in document["nodes"]]


async def test_ten_reloads(tmp_path: Path) -> None:
    await stream_through_reloads(tmp_path, seed=3, count=10)


@pytest.mark.slow
async def test_fifty_reloads(tmp_path: Path) -> None:
    await stream_through_reloads(tmp_path, seed=15, count=50)
