"""What a service manager is told, through a real socket of the kind that systemd gives."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumesh.daemon.mesh_process import run_mesh
from gpumesh.daemon.service.manager_link import ManagerLink
from gpumesh.daemon.shutdown import Shutdown
from tests.daemon.test_mesh_process import TOPOLOGY, paths_in


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with (
        tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener,
    ):
        address = f"{folder}/notify" if request.param == "path" else f"@{folder}"
        listener.bind(address.replace("@", "\0"))
        listener.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield listener


def received(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().split("\n")


def test_without_a_manager_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert ManagerLink.from_environment() is None


def test_a_manager_that_is_gone_stops_nothing() -> None:
    ManagerLink("/nowhere/notify", None).send_ready("x")


async def test_a_mesh_tells_when_it_serves_and_when_it_stops(manager: socket.socket, tmp_path: Path) -> None:
    async with run_mesh(TOPOLOGY, paths_in(tmp_path), gateway=False, shutdown=Shutdown()):
        assert received(manager) == ["READY=1", "STATUS=tunnels only"]
    assert received(manager) == ["STOPPING=1"]


async def test_the_watchdog_is_told_while_the_loop_runs(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    link = ManagerLink.from_environment()
    assert link is not None
    assert link.watchdog_s == pytest.approx(0.06)
    task = asyncio.ensure_future(link.keep_alive())
    manager.setblocking(False)
    loop = asyncio.get_running_loop()
    for _ in range(3):
        assert await loop.sock_recv(manager, 100) == b"WATCHDOG=1"
    task.cancel()


def test_the_watchdog_of_another_process_is_not_ours(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    link = ManagerLink.from_environment()
    assert link is not None
    assert link.watchdog_s is None


def test_a_status_is_one_line(manager: socket.socket) -> None:
    link = ManagerLink.from_environment()
    assert link is not None
    link.send_ready("serves\nREADY=0")
    assert received(manager) == ["READY=1", "STATUS=serves"]
