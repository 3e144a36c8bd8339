"""Tunnels as the mesh runs them, with all they said kept, for tests."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gpumesh.state import TunnelPhase, TunnelState
from gpumesh.topology import (
    DEFAULT_TUNNELS,
    BackendSpec,
    NodeSpec,
    SshSpec,
    Target,
    TransportKind,
    TunnelsSpec,
)
from gpumesh.tunnels.supervisor import CLIENT_WAIT_S, Prompter, SshTunnel, run_tunnel
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.tunnels.polling import wait_until

UP, BACKOFF, CONNECTING = TunnelPhase.UP, TunnelPhase.BACKOFF, TunnelPhase.CONNECTING
FAILED, CLOSED = TunnelPhase.FAILED, TunnelPhase.CLOSED


@dataclass
class WatchedTunnel:
    """``states`` holds every state that it told of."""

    tunnel: SshTunnel
    states: list[TunnelState] = field(default_factory=list)

    @property
    def phases(self) -> list[TunnelPhase]:
        """In order, each once until it changed."""
        told = [state.state for state in self.states]
        return [phase for index, phase in enumerate(told) if index == 0 or told[index - 1] is not phase]

    @property
    def phase(self) -> TunnelPhase:
        return self.tunnel.state.state

    @property
    def ports(self) -> list[int]:
        return [int(url.rpartition(":")[2]) for url in self.tunnel.urls.values()]

    def has_passed(self, *phases: TunnelPhase) -> bool:
        """Whether it went through these, in this order, others between them or not."""
        remaining = iter(self.phases)
        return all(phase in remaining for phase in phases)


def node(ssh: SshSpec, *ports: int) -> NodeSpec:
    targets = tuple(Target("127.0.0.1", port) for port in ports)
    return NodeSpec("iceland", BackendSpec(targets=targets), ssh)


def watched(
    pool: WorkerPool,
    ssh: SshSpec,
    *ports: int,
    ask: Prompter | None = None,
    grace_s: float = CLIENT_WAIT_S,
    tunnels: TunnelsSpec = DEFAULT_TUNNELS,
) -> WatchedTunnel:
    states: list[TunnelState] = []
    tunnel = SshTunnel(
        node(ssh, *ports), ssh, clock=time.monotonic, rng=random.Random(0), workers=pool, on_change=states.append,
        prompter=ask, client_wait_s=grace_s, tunnels_spec=tunnels, mesh_name="home",
    )  # fmt: skip
    return WatchedTunnel(tunnel, states)


@contextlib.asynccontextmanager
async def supervised(
    pool: WorkerPool,
    ssh: SshSpec,
    *ports: int,
    ask: Prompter | None = None,
    grace_s: float = CLIENT_WAIT_S,
    tunnels: TunnelsSpec = DEFAULT_TUNNELS,
) -> AsyncIterator[WatchedTunnel]:
    one = watched(pool, ssh, *ports, ask=ask, grace_s=grace_s, tunnels=tunnels)
    async with run_tunnel(one.tunnel):
        yield one


def descendants(pid: int) -> list[int]:
    """All processes that it started, and theirs."""
    found: list[int] = []
    pending = [pid]
    while pending:
        for task in Path(f"/proc/{pending.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                pids = [int(one) for one in task.read_text().split()]
                found += pids
                pending += pids
    return found


def descriptors() -> list[str]:
    """What this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(found)


LONG_S = 600.0  # a keepalive interval in which nothing is noticed by it


both = pytest.mark.parametrize("transport", list(TransportKind))


async def until_phase(one: WatchedTunnel, phase: TunnelPhase) -> None:
    await wait_until(lambda: one.phase is phase, f"{phase}; it is {one.tunnel.state}")


async def until_reconnected(one: WatchedTunnel, times: int) -> None:
    await wait_until(lambda: one.tunnel.state.reconnects == times and one.phase is UP, f"reconnect {times}")
