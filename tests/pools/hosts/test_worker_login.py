"""The way from the head straight to a worker: this machine is the head, a real sshd is the worker."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.pools.base import PathKind
from gpumesh.pools.hosts.guarded_program import run_guarded
from gpumesh.pools.hosts.paths import measure_head_to_worker, measure_through_us
from gpumesh.pools.hosts.worker_login import (
    FORWARD_READY,
    WorkerLogin,
    forward_argv,
    make_worker_login,
    may_log_in,
)
from gpumesh.topology import BackendSpec, NodeSpec
from tests.pools.hosts.local_route import LocalRoute, local_route
from tests.prerequisites import needs
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import Sshd, listener, port_of_this_worker, run_agent

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Sshd]:
    async with Sshd(tmp_path / "sshd", {"LogLevel": "INFO"}) as sshd:
        (tmp_path / "sshd/.bashrc").write_text("echo Welcome!\n")  # a login shell that writes before our command
        yield sshd


@pytest.fixture
async def head(tmp_path: Path, worker: Sshd) -> AsyncIterator[LocalRoute]:
    """Its ssh has the worker's key in an agent. Its temporary files are in a folder of the test's."""
    (tmp_path / "tmp").mkdir()
    with run_agent(tmp_path, worker.identity) as agent:
        environment = dict(os.environ, SSH_AUTH_SOCK=str(agent), TMPDIR=str(tmp_path / "tmp"))
        async with local_route(environment=environment) as route:
            yield route


def login_for(worker: Sshd, **changes: object) -> WorkerLogin:
    node = NodeSpec("cellar", BackendSpec(), worker.spec(**changes))
    login = make_worker_login(node, mesh="home")
    assert login is not None
    return login


async def test_a_head_with_a_key_may_log_in(head: LocalRoute, worker: Sshd, tmp_path: Path) -> None:
    login = login_for(worker)
    assert login.host_keys == (worker.public_host_key,)
    assert await may_log_in(head, login) is None
    assert not list((tmp_path / "tmp").iterdir()), "the known_hosts file is removed"


async def test_a_head_without_a_key_may_not(worker: Sshd, tmp_path: Path) -> None:
    async with local_route(environment={"PATH": os.environ["PATH"]}) as head:
        reason = await may_log_in(head, login_for(worker, user="nobody"))
    assert reason is not None
    assert "Permission denied" in reason


async def test_a_head_does_not_trust_another_host_key(head: LocalRoute, worker: Sshd, tmp_path: Path) -> None:
    other = Sshd(tmp_path / "other")
    login = login_for(worker)
    login = WorkerLogin(login.node, login.user, login.host, login.port, (other.public_host_key,))
    reason = await may_log_in(head, login)
    assert reason is not None
    assert "Host key verification failed" in reason


def test_no_login_without_a_recorded_key_or_behind_a_jump_host(tmp_path: Path) -> None:
    worker = Sshd(tmp_path / "sshd", port=2222)
    for node in (
        NodeSpec("cellar", BackendSpec()),
        NodeSpec("cellar", BackendSpec(), worker.spec()),  # it has not started yet: no key is on record
        NodeSpec("cellar", BackendSpec(), worker.spec(proxy_jump=("bastion",))),
    ):
        assert make_worker_login(node, mesh="home") is None


async def test_both_ways_are_measured(head: LocalRoute, worker: Sshd, tmp_path: Path) -> None:
    direct = await measure_head_to_worker(head, login_for(worker))
    assert direct.kind is PathKind.HEAD_TO_WORKER
    assert direct.rtt_ms is not None
    assert 0.0 < direct.rtt_ms < 1000.0
    assert direct.bytes_per_s is not None
    assert direct.bytes_per_s > 1e5
    await wait_until(lambda: not list((tmp_path / "tmp").iterdir()), "the end of the script on the head")
    through_us = await measure_through_us(head, head)
    assert through_us.kind is PathKind.THROUGH_US
    assert through_us.rtt_ms is not None
    assert through_us.bytes_per_s is not None


async def test_the_forward_leads_to_the_workers_port_and_ends_with_its_program(
    head: LocalRoute, worker: Sshd, tmp_path: Path
) -> None:
    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"weights")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    worker_port, head_port = server.sockets[0].getsockname()[1], port_of_this_worker()
    argv = forward_argv(login_for(worker), head_port=head_port, worker_port=worker_port)
    async with server, run_guarded(head, argv) as way:
        async for line in way.lines():
            if line == FORWARD_READY:
                break
        reader, writer = await asyncio.open_connection("127.0.0.1", head_port)
        assert await reader.read() == b"weights"
        writer.close()
        await writer.wait_closed()
    assert way.end is not None
    assert not list((tmp_path / "tmp").iterdir())
    await wait_until(lambda: not worker.children(), "the end of the session on the worker")


async def test_a_forward_whose_port_is_taken_ends_with_the_reason(head: LocalRoute, worker: Sshd) -> None:
    with listener() as taken:
        argv = forward_argv(login_for(worker), head_port=taken.getsockname()[1], worker_port=1)
        async with run_guarded(head, argv) as way:
            end = await way.wait_ended()
    assert end.exit_status == 255
    assert any("Address already in use" in line for line in end.last_lines)
