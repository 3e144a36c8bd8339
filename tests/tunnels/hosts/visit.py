"""Visits a host as a mesh does: opens a tunnel, sends bytes through it, probes the GPUs, runs a person's command."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gpumesh.errors import ExecError
from gpumesh.probes.commands.host_commands import HostCommands
from gpumesh.probes.nvidia_smi import Answer, GpuReport, probe_gpus
from gpumesh.topology import SshSpec, TransportKind
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.tunnels.hosts.account import USER, Account
from tests.tunnels.hosts.dropbear import Dropbear
from tests.tunnels.sshd import Sshd
from tests.tunnels.supervised import WatchedTunnel, supervised
from tests.tunnels.traffic import exchange

PATIENCE_S = 20.0


@dataclass(frozen=True)
class Expected:
    """What is found. ``code``: of the finding that is there while the GPUs are unknown. ``text``: a part of its
    message. ``gpus``: the number of known GPUs. ``exec_works``: a person's command runs."""

    answer: Answer = Answer.COMPLETE
    code: str | None = None
    text: str = ""
    gpus: int = 1
    exec_works: bool = True


@dataclass(frozen=True)
class Host:
    """A host as people have it. ``options`` are sshd's; with ``dropbear`` they are not used. ``arguments`` are
    dropbear's. ``smi`` is as in ``Account``, and "" for its default. ``agent``: the key is in an agent only.
    ``expected_openssh``: where transport openssh finds something else, after ``reconnects_openssh`` reconnects.
    ``timeout_s``: of each probe of the GPUs."""

    name: str
    expected: Expected = field(default_factory=Expected)
    expected_openssh: Expected | None = None
    reconnects_openssh: int = 0
    shell: str = "bash"
    files: Mapping[str, str] = field(default_factory=dict)
    smi: str | None = ""
    options: Mapping[str, str] = field(default_factory=dict)
    dropbear: bool = False
    arguments: tuple[str, ...] = ()
    spec: Mapping[str, object] = field(default_factory=dict)
    has_password: bool = False
    agent: bool = False
    timeout_s: float = PATIENCE_S
    needs: tuple[str, ...] = ()

    def expects(self, transport: TransportKind) -> Expected:
        if transport is TransportKind.OPENSSH and self.expected_openssh is not None:
            return self.expected_openssh
        return self.expected


@dataclass
class Visit:
    """One transport's visit of a host. ``skipped_s`` is added to the clock of ``commands``."""

    watched: WatchedTunnel
    timeout_s: float
    skipped_s: float = 0.0

    def __post_init__(self) -> None:
        self.commands = HostCommands(self.watched.tunnel, clock=lambda: time.monotonic() + self.skipped_s)

    async def probe(self) -> GpuReport:
        return await probe_gpus(self.commands, timeout_s=self.timeout_s, node="iceland")

    async def probe_until(self, condition: Callable[[GpuReport], bool]) -> GpuReport:
        """Probes as the prober does, until a report fulfils the condition."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition(report := await self.probe()):
                await asyncio.sleep(0.05)
            return report

    async def run(self, *argv: str) -> bytes | None:
        """The output of a person's command; ``None`` if it could not be run."""
        try:
            result = await self.watched.tunnel.exec(argv, timeout_s=PATIENCE_S)
        except ExecError:
            return None
        return result.stdout


@contextlib.asynccontextmanager
async def running(host: Host, folder: Path) -> AsyncIterator[tuple[Account, Sshd | Dropbear]]:
    """The host's account and its server."""
    smi = {} if host.smi == "" else {"smi": host.smi}
    account = Account(folder, host.shell, dict(host.files), has_password=host.has_password, **smi)
    if host.dropbear:
        async with Dropbear(folder / "server", account, host.arguments) as dropbear:
            yield account, dropbear
        return
    options = {"LogLevel": "INFO", "SetEnv": f"PATH={account.path}"}
    for name, value in host.options.items():
        options[name] = value.format(home=account.home)
    async with Sshd(folder / "server", options, prefix=account.wrapper()) as sshd:
        yield account, sshd


@contextlib.asynccontextmanager
async def visiting(
    host: Host, server: Sshd | Dropbear, pool: WorkerPool, backend: int, transport: TransportKind
) -> AsyncIterator[Visit]:
    """A tunnel to the host that is up, and carries bytes."""
    spec = spec_for(host, server, transport)
    async with supervised(pool, spec, backend) as watched:
        async with asyncio.timeout(PATIENCE_S):
            await watched.tunnel.wait_up()
        assert await exchange(watched.ports[0], b"hello") == b"hello"
        yield Visit(watched, host.timeout_s)


def spec_for(host: Host, server: Sshd | Dropbear, transport: TransportKind) -> SshSpec:
    changes = {**host.spec, **({"identity_files": (), "agent": True} if host.agent else {})}
    return server.spec(user=USER, transport=transport, keepalive_s=0.5, **changes)
