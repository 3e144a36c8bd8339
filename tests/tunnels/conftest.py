"""Fixtures of this room and its sub-rooms: a real sshd, a pool of workers, a backend, a folder for sockets."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gpumesh.topology import TransportKind
from gpumesh.tunnels.transport import ConnectFunction
from gpumesh.tunnels.transports import load_connect
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.tunnels.kept_zygote import KeptZygote, LastingPool
from tests.tunnels.sshd import Sshd, listener, serving
from tests.tunnels.traffic import echo


@pytest.fixture
def runtime(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sockets of transport openssh lie."""
    folder = tmp_path_factory.mktemp("r")
    folder.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


@pytest.fixture(params=list(TransportKind))
def transport(request: pytest.FixtureRequest) -> TransportKind:
    """Each transport in turn."""
    kind: TransportKind = request.param
    return kind


@pytest.fixture
def connect(transport: TransportKind) -> ConnectFunction:
    return load_connect(transport)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a connection. Its path is short, because the paths of sockets are limited."""
    path = tmp_path_factory.mktemp("c")
    path.chmod(0o700)
    return path


@pytest.fixture
async def sshd(tmp_path: Path) -> AsyncIterator[Sshd]:
    async with Sshd(tmp_path / "sshd", {"LogLevel": "INFO"}) as sshd:
        yield sshd


@pytest.fixture(scope="module")
def kept_zygote() -> Iterator[KeptZygote]:
    kept = KeptZygote()
    yield kept
    kept.end()


@pytest.fixture
async def pool(kept_zygote: KeptZygote) -> AsyncIterator[WorkerPool]:
    async with LastingPool(kept_zygote) as pool:
        yield pool


@pytest.fixture
async def backend() -> AsyncIterator[int]:
    async with serving(echo) as port:
        yield port


@pytest.fixture
def local() -> Iterator[socket.socket]:
    with listener() as sock:
        yield sock
