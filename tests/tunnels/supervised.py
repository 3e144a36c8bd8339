"""Tunnels as the mesh runs them, with all their states recorded, for tests."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Sequence
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
from gpumesh.tunnels.listeners import CLIENT_WAIT_S
from gpumesh.tunnels.supervisor import Prompter, SshTunnel, run_tunnel
from gpumesh.tunnels.transport import ReverseForward
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.tunnels.polling import wait_until

UP, BACKOFF, CONNECTING = TunnelPhase.UP, TunnelPhase.BACKOFF, TunnelPhase.CONNECTING
FAILED, CLOSED = TunnelPhase.FAILED, TunnelPhase.CLOSED


@dataclass
class WatchedTunnel:
    """``states`` holds every state that the tunnel announced."""

    tunnel: SshTunnel
    states: list[TunnelState] = field(default_factory=list)

    @property
    def phases(self) -> list[TunnelPhase]:
        """The phases in order, without repetitions."""
        phases = [state.state for state in self.states]
        return [phase for index, phase in enumerate(phases) if index == 0 or phases[index - 1] is not phase]

    @property
    def phase(self) -> TunnelPhase:
        return self.tunnel.state.state

    @property
    def ports(self) -> list[int]:
        return [int(url.rpartition(":")[2]) for url in self.tunnel.urls.values()]

    def has_passed(self, *phases: TunnelPhase) -> bool:
        """Whether it went through these phases in this order, perhaps with others between them."""
        remaining = iter(self.phases)
        return all(phase in remaining for phase in phases)


def node(ssh: SshSpec, *ports: int) -> NodeSpec:
    targets = tuple(Target("127.0.0.1", port) for port in ports)
    return NodeSpec("iceland", BackendSpec(targets=targets), ssh)


def make_watched(
    pool: WorkerPool,
    ssh: SshSpec,
    *ports: int,
    prompter: Prompter | None = None,
    client_wait_s: float = CLIENT_WAIT_S,
    tunnels: TunnelsSpec = DEFAULT_TUNNELS,
    reverse: Sequence[ReverseForward] = (),
) -> WatchedTunnel:
    states: list[TunnelState] = []
    tunnel = SshTunnel(
        node(ssh, *ports), ssh, clock=time.monotonic, rng=random.Random(0), workers=pool, on_change=states.append,
        prompter=prompter, client_wait_s=client_wait_s, tunnels_spec=tunnels, mesh_name="home",
        reverse_forwards=reverse,
    )  # fmt: skip
    return WatchedTunnel(tunnel, states)


@contextlib.asynccontextmanager
async def supervised(
    pool: WorkerPool,
    ssh: SshSpec,
    *ports: int,
    prompter: Prompter | None = None,
    client_wait_s: float = CLIENT_WAIT_S,
    tunnels: TunnelsSpec = DEFAULT_TUNNELS,
    reverse: Sequence[ReverseForward] = (),
) -> AsyncIterator[WatchedTunnel]:
    watched = make_watched(
        pool, ssh, *ports, prompter=prompter, client_wait_s=client_wait_s, tunnels=tunnels, reverse=reverse
    )
    async with run_tunnel(watched.tunnel):
        yield watched


def descendants(pid: int) -> list[int]:
    """All children of a process, their children, and so on."""
    descendant_pids: list[int] = []
    pending = [pid]
    while pending:
        for task in Path(f"/proc/{pending.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                pids = [int(child) for child in task.read_text().split()]
                descendant_pids += pids
                pending += pids
    return descendant_pids


def descriptors() -> list[str]:
    """The open files of this process."""
    open_files = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed by now
            open_files.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(open_files)


LONG_S = 600.0  # a keepalive interval in which the keepalive notices nothing


both = pytest.mark.parametrize("transport", list(TransportKind))


async def wait_phase(watched: WatchedTunnel, phase: TunnelPhase) -> None:
    await wait_until(lambda: watched.phase is phase, f"{phase}; it is {watched.tunnel.state}")


async def wait_reconnects(watched: WatchedTunnel, times: int) -> None:
    await wait_until(lambda: watched.tunnel.state.reconnects == times and watched.phase is UP, f"reconnect {times}")
