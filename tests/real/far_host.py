"""A GPU host behind a network: OpenSSH's sshd and a stand-in for Ollama, in their own network namespace."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from gpumesh.config import environment
from gpumesh.lab import profile
from gpumesh.lab.host import HostStart
from gpumesh.topology import BackendSpec, NodeSpec, Target, TransportKind
from gpumesh.tunnels import known_hosts, transports
from gpumesh.wire import to_json
from tests.real.fork_server import LAB_HOST
from tests.real.netns import Namespace
from tests.real.warm_commands import OWN_NETWORK, warm_commands
from tests.tunnels.sshd import Sshd

MODEL = "qwen2.5:7b"
OLLAMA = 11434
START_S = 30.0
ESTABLISHED = "01"  # as /proc/net/tcp has it


def lively_host(name: str) -> profile.HostProfile:
    """A host that answers within half a second, also many clients at once. Its tokens are few: they are what costs CPU,
    and each answer takes as long as with many."""
    return profile.make_host(
        name,
        tokens_per_s=40.0,
        prefill_tokens_per_s=None,
        load_s=0.0,
        slots=64,
        answer_tokens=(6, 16),
        ssh=False,
    )


class HostProcess:
    """A host of the lab without SSH, as a fork of a process that has imported it already (warm_commands.py). An async
    context manager; the end is SIGKILL. ``network``: the namespace in which it listens, else the caller's."""

    def __init__(self, host: profile.HostProfile, *, port: int = 0, network: Path = OWN_NETWORK) -> None:
        assert not host.ssh
        self.port = port
        self.pid = 0
        self._profile = host
        self._network = network
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            started = warm_commands().piped(
                (LAB_HOST,), env=environment.child_environment(), cwd=Path("/"), stdin=True, network=self._network
            )
            process = await stack.enter_async_context(started)
            assert process.stdin is not None
            assert process.stdout is not None
            start = HostStart(self._profile, host_key="", authorized=(), backend_port=self.port)
            process.stdin.write(json.dumps(to_json(start)).encode() + b"\n")
            async with asyncio.timeout(START_S):
                reply = await process.stdout.readline()
            assert reply, (await process.communicate())[1].decode()
            self.port, self.pid = json.loads(reply)["backend_port"], process.pid
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()


class FarHost:
    """An async context manager. ``sshd`` is its SSH server, ``net`` the cable to it. Its ``known_hosts`` is empty until
    ``trust``."""

    def __init__(self, folder: Path) -> None:
        self.net = Namespace()
        self.sshd = Sshd(folder / "sshd")
        self.known_hosts = folder / "known_hosts"
        self._ollama: HostProcess | None = None
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.net)
            stack.push_async_callback(self.stop_ollama)
            await self.start_ollama()
            self.sshd.address, self.sshd.prefix = self.net.there, self.net.prefix
            self.sshd.options["ListenAddress"] = "0.0.0.0"
            await stack.enter_async_context(self.sshd)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def node(self, name: str, transport: TransportKind, **changes: Any) -> NodeSpec:
        """``changes`` are fields of its ``ssh``."""
        backend = BackendSpec(targets=(Target("127.0.0.1", OLLAMA),))
        changes = {"transport": transport, "known_hosts": self.known_hosts, **changes}
        return NodeSpec(name, backend, ssh=self.sshd.spec(**changes))

    async def trust(self, *nodes: str, mesh: str = "") -> None:
        """Records its key for these nodes of the mesh with this ``Topology.identity``, as `gpumesh trust` does."""
        for node in nodes:
            key = await transports.fetch_host_key(node, self.sshd.spec())
            known_hosts.record_host_key(
                self.known_hosts, key, known_hosts.KnownHost(self.sshd.address, self.sshd.port, node, mesh)
            )

    # -- its Ollama --------------------------------------------------------------------------------------------------

    async def start_ollama(self) -> None:
        self._ollama = HostProcess(lively_host("far"), port=OLLAMA, network=Path(f"/proc/{self.net.pid}/ns/net"))
        await self._ollama.__aenter__()

    async def stop_ollama(self) -> None:
        """SIGKILL."""
        if self._ollama is not None:
            await self._ollama.__aexit__()
            self._ollama = None

    # -- its sshd ----------------------------------------------------------------------------------------------------

    @property
    def listener(self) -> int:
        assert self.sshd.process is not None
        return self.sshd.process.pid

    def sessions(self) -> set[int]:
        """The processes of all its SSH connections, also of those whose listener is gone."""
        others = {self._ollama.pid if self._ollama is not None else 0}
        if self.sshd.process is not None:
            others.add(self.listener)
        return self.net.processes() - others

    def signal(self, pids: Iterable[int], signal_number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal_number)

    async def kill_listener(self) -> None:
        """SIGKILL for the listening process. Accepted connections have processes of their own."""
        assert self.sshd.process is not None
        self.sshd.process.kill()
        await asyncio.to_thread(self.sshd.process.wait)
        self.sshd.process = None

    async def kill_sessions(self) -> None:
        self.signal(self.sessions(), signal.SIGKILL)

    async def restart_sshd(self, **options: str) -> None:
        """As after a change of sshd_config; existing connections are ended as well."""
        before = self.sessions()
        await self.sshd.stop()
        self.signal(before, signal.SIGKILL)
        self.sshd.options |= options
        await self.sshd.start()

    def connections(self) -> int:
        """How many SSH connections are established in its kernel."""
        rows = [line.split() for line in Path(f"/proc/{self.net.pid}/net/tcp").read_text().splitlines()[1:]]
        return sum(row[3] == ESTABLISHED and int(row[1].rpartition(":")[2], 16) == self.sshd.port for row in rows)
