"""Fixtures of the tests with real parts: two hosts with sshd and llama-server, and the command with their mesh.yaml.

With GPUMESH_TEST_OLLAMA=http://HOST:PORT the tests that use ``backends`` run a second time, with that Ollama behind
both hosts (GPUMESH_TEST_MODEL, else its first model).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.http_clients import loopback_client
from tests.prerequisites import needs, program
from tests.real.command import Gpumesh, write_config
from tests.real.hosts import LlamaServer, RealHost, hosts
from tests.real.netns import private_network

OLLAMA = os.environ.get("GPUMESH_TEST_OLLAMA")


@dataclass(frozen=True)
class Backends:
    """The servers behind the two hosts, and the model that both have. ``servers`` is empty for an Ollama elsewhere."""

    entries: tuple[dict[str, Any], dict[str, Any]]
    model: str
    servers: tuple[LlamaServer, ...] = ()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.real.tiny_model import write_tiny_model  # numpy takes its time, and is for these tests only

    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(params=["llama-server", *(["ollama"] if OLLAMA else [])])
async def backends(request: pytest.FixtureRequest) -> AsyncIterator[Backends]:
    if request.param == "ollama":
        assert OLLAMA is not None
        async with loopback_client(timeout=10) as client:
            models = (await client.get(f"{OLLAMA}/api/tags")).json()["models"]
        entry = {"kind": "ollama", "url": OLLAMA}
        yield Backends((entry, entry), os.environ.get("GPUMESH_TEST_MODEL") or models[0]["name"])
        return
    model = request.getfixturevalue("tiny_model")
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(LlamaServer(model)) for _ in range(2)]
        yield Backends((servers[0].backend(), servers[1].backend()), servers[0].alias, tuple(servers))


@pytest.fixture
async def two_hosts(backends: Backends, tmp_path: Path) -> AsyncIterator[list[RealHost]]:
    async with hosts(tmp_path, backends.entries) as made:
        yield made


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Gpumesh]:
    """The command, without any files of this machine's user. A test writes its mesh.yaml."""
    home = tmp_path / "home"
    home.mkdir()
    runtime = Path(tempfile.mkdtemp(prefix="gm-", dir="/tmp"))  # short: it holds a Unix socket
    command = Gpumesh(tmp_path / "mesh.yaml", home, runtime)
    yield command
    left = command.processes()
    command.kill_all()
    shutil.rmtree(runtime, ignore_errors=True)
    assert not left, f"processes were left: {left}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    """A headless Chromium for all tests of a module, which run in the module's event loop. Each test opens contexts of
    its own, which share neither cookies nor service workers."""
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=program("chromium"), args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            await chromium.close()


@pytest.fixture
def own_network() -> Iterator[None]:
    """The test runs in a network namespace of its own."""
    with private_network():
        yield


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The runtime folder of meshes that run in this process."""
    folder = Path(tempfile.mkdtemp(prefix="gm-", dir="/tmp"))  # short: it holds Unix sockets
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def gpumesh(alone: Gpumesh, two_hosts: list[RealHost], backends: Backends) -> Gpumesh:
    """The command with a mesh.yaml of both hosts."""
    write_config(alone.config, [host.node() for host in two_hosts], model=backends.model)
    return alone


__all__ = ["needs"]
