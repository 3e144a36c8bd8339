"""The gateway on a Unix socket, alone and beside its port, for clients of this user and of others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from gpumesh.errors import GPUMeshError, MeshAlreadyRunning
from gpumesh.gateway.app import Gateway
from gpumesh.gateway.observe.access_log import AccessLog
from gpumesh.lab.ollama import SimOllama
from gpumesh.mesh.mesh import Mesh
from gpumesh.state import GatewayPhase, LocalAccess
from gpumesh.topology import GatewaySpec, Topology
from tests.gateway.fleet import MODEL, A, lines, node
from tests.http_clients import loopback_client
from tests.prerequisites import needs
from tests.tunnels.other_user import ANOTHER, connect_as
from tests.tunnels.supervised import descriptors


@pytest.fixture
def path() -> Iterator[Path]:
    """In a folder that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder) / "gateway.sock"


@contextlib.asynccontextmanager
async def listening(spec: GatewaySpec, access_log: AccessLog | None = None) -> AsyncIterator[tuple[Mesh, Gateway]]:
    async with SimOllama(A) as host:
        topology = Topology("test", (node("a", host.url),), spec)
        async with Mesh(topology) as mesh, Gateway(mesh, access_log=access_log) as gateway:
            await mesh.wait_first_report(10.0)
            yield mesh, gateway


def client_of(path: Path) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    return loopback_client(transport=transport, base_url="http://localhost", timeout=20)


def only(path: Path, **more: object) -> GatewaySpec:
    return replace(GatewaySpec(host=None, socket=path), **more)  # type: ignore[arg-type]


async def test_a_unix_socket_alone_serves_everything(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    async with listening(only(path), AccessLog(log)) as (mesh, gateway), client_of(path) as client:
        state = mesh.snapshot().gateway
        assert gateway.url == f"unix:{path}"
        assert (state.url, state.socket, state.state) == (f"unix:{path}", str(path), GatewayPhase.SERVING)
        assert state.access is LocalAccess.OWN_USER
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (await client.get("/")).text == "Ollama is running"
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/mesh/status")).json()["gateway"]["url"] == f"unix:{path}"
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
        assert lines((await client.post("/api/chat", json=chat)).text)[-1]["done"] is True
        for host, status in (("localhost", 200), ("unix", 200), ("evil.example.com", 403), ("", 403)):
            assert (await client.get("/", headers={"Host": host})).status_code == status
    assert not path.exists()
    assert {json.loads(line)["client"] for line in log.read_text().splitlines()} == {"unix"}


async def test_a_unix_socket_and_a_port(path: Path) -> None:
    async with listening(GatewaySpec(port=0, socket=path)) as (mesh, gateway), client_of(path) as client:
        state = mesh.snapshot().gateway
        assert gateway.url.startswith("http://127.0.0.1:")
        assert (state.url, state.socket, state.access) == (gateway.url, str(path), LocalAccess.ANY_USER)
        async with loopback_client(base_url=gateway.url) as other:
            assert (await other.get("/api/tags")).json() == (await client.get("/api/tags")).json()
            assert (await other.get("/", headers={"Host": "localhost"})).status_code == 200


async def test_the_unix_socket_asks_for_a_key_as_well(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "hunter2")
    async with listening(only(path, api_key_env="KEY")) as (mesh, _gateway), client_of(path) as client:
        assert mesh.snapshot().gateway.access is LocalAccess.KEY
        assert (await client.get("/api/tags")).status_code == 401
        assert (await client.get("/api/tags", headers={"x-api-key": "hunter2"})).status_code == 200


@needs("root")
async def test_another_user_cannot_open_the_unix_socket(path: Path) -> None:
    async with listening(only(path)):
        assert await connect_as(str(path), uid=ANOTHER, way="unix") == "PermissionError"
        assert (await connect_as(str(path), uid=0, way="unix")).startswith("answer HTTP/1.1 400")


async def test_a_path_that_is_taken(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    async with listening(only(path)) as (mesh, _), client_of(path) as client:  # nobody listens there any more
        assert (await client.get("/")).status_code == 200
        with pytest.raises(MeshAlreadyRunning, match="another program listens"):
            await Gateway(mesh).__aenter__()
        assert (await client.get("/")).status_code == 200
    path.write_text("precious")
    with pytest.raises(MeshAlreadyRunning, match="is no socket"):
        async with listening(only(path)):
            pass
    assert path.read_text() == "precious"


async def test_a_failed_start_leaves_nothing_behind(path: Path) -> None:
    async with SimOllama(A) as host:
        topology = Topology("test", (node("a", host.url),), GatewaySpec(port=0, socket=path.parent / "no" / "x.sock"))
        async with Mesh(topology) as mesh:
            await mesh.wait_first_report(10.0)
            before = descriptors()
            with pytest.raises(GPUMeshError, match="No such file or directory") as caught:
                await Gateway(mesh).__aenter__()
            assert "in a folder that exists" in (caught.value.hint or "")
            await asyncio.sleep(0)
            assert [each for each in descriptors() if each not in before] == []  # the port was given back
