"""One simulated host: its SSH server and its stand-in for Ollama, with one set of faults. It is also a program.

``SimHost`` runs in the calling process, for tests that look inside. As a program (``python -m gpumesh.lab.host``) the
host has its own process, which can be killed and stopped like a real machine. ``lab.LabHost`` starts this process. It
writes questions to the process's standard input and reads replies from its standard output, each a JSON object on one
line. The process ends with its parent, even if the parent is killed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults, HostProfile, SimCounters
from gpumesh.lab.shell import SimShell
from gpumesh.wire import from_json, to_json

if TYPE_CHECKING:
    from gpumesh.lab.ssh import SimSshServer

LINE_LIMIT = 64 << 20  # bytes; one line can hold the log of ten thousand requests


@dataclass(frozen=True, slots=True)
class HostStart:
    """The first message to a host's process: what the host is like, its keys, and its ports.

    ``host_key`` is a private key; ``authorized`` are lines of authorized_keys. Port 0: the host chooses a free port. A
    host that is started again gets its earlier ports.
    """

    profile: HostProfile
    host_key: str
    authorized: tuple[str, ...]
    ssh_port: int = 0
    backend_port: int = 0


class SimHost:
    """One simulated host in this process. An async context manager; the ports are valid from its start to its end."""

    def __init__(self, start: HostStart) -> None:
        self.profile = start.profile
        self.backend = SimOllama(start.profile, port=start.backend_port)
        self.ssh: SimSshServer | None = None
        self._start = start
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.backend)
            if self.profile.ssh:
                # paramiko is a quarter of the start of a host's process, and a host without SSH does without it.
                from gpumesh.lab.keys import parse_private_key, parse_public_key
                from gpumesh.lab.ssh import SimSshServer

                ports = {self.profile.backend_port: self.backend.port}
                shell = SimShell(self.profile, self.backend.engine.gpu_load, lambda: self.backend.faults, ports)
                server = SimSshServer(
                    shell,
                    host_keys=[parse_private_key(self._start.host_key)],
                    authorized_keys=[parse_public_key(line) for line in self._start.authorized],
                    ports=ports,
                    port=self._start.ssh_port,
                    faults=lambda: self.backend.faults,
                )
                self.ssh = await stack.enter_async_context(server)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def ssh_port(self) -> int | None:
        """The port of the SSH server; ``None`` for a host without SSH."""
        return None if self.ssh is None else self.ssh.port

    @property
    def backend_port(self) -> int:
        return self.backend.port

    @property
    def counters(self) -> SimCounters:
        return self.backend.counters

    async def set_faults(self, faults: Faults) -> None:
        """Replaces the host's faults from now on.

        Open SSH connections stay open, also if the host refuses keys from now on: ``drop_connections`` cuts them.
        """
        await self.backend.set_faults(faults)

    async def drop_connections(self) -> None:
        """Cuts all SSH connections, as a router or a restart of sshd does. The port stays open."""
        if self.ssh is not None:
            await self.ssh.drop_connections()


async def _answer(host: SimHost, question: dict[str, Any]) -> dict[str, Any]:
    """Does what the question asks for, and returns the reply. Raises ``ValueError`` for an unknown question."""
    match question.get("ask"):
        case "faults":
            await host.set_faults(from_json(Faults, question["faults"]))
            return {}
        case "drop-connections":
            await host.drop_connections()
            return {}
        case "counters":
            return {"counters": to_json(host.counters)}
    raise ValueError(f"no such question: {question.get('ask')!r}")


async def _open_stdin() -> asyncio.StreamReader:
    """Opens standard input for reading on the event loop."""
    reader = asyncio.StreamReader(limit=LINE_LIMIT)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def _write_reply(reply: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


async def serve_host() -> None:
    """Runs one host until standard input ends. The first line is a ``HostStart``, each later line is a question.

    Each line gets one line as its reply. The reply to the first line comes when the host is ready, and holds the ports.
    If standard input ends before the first line, no host is started.
    """
    questions = await _open_stdin()
    start_line = await questions.readline()
    if not start_line:
        return
    async with SimHost(from_json(HostStart, json.loads(start_line))) as host:
        _write_reply({"ssh_port": host.ssh_port, "backend_port": host.backend_port})
        while line := await questions.readline():
            try:
                _write_reply(await _answer(host, json.loads(line)))
            except ValueError as error:  # no JSON, or an unknown question: a fault of the caller, not of the host
                _write_reply({"error": str(error)})


def main(_arguments: Sequence[str] = ()) -> None:
    """Runs the program: one host, whose process ends with its parent."""
    from gpumesh.tunnels.local_system import child_process

    child_process.die_with_parent()
    sys.modules["invoke"] = None  # type: ignore[assignment]  # as tunnels/workers/zygote.py: paramiko need not import it
    with suppress(KeyboardInterrupt):  # Ctrl-C goes to the whole process group: the parent ends this process
        try:
            import uvloop

            uvloop.run(serve_host())
        except ImportError:  # not on this platform
            asyncio.run(serve_host())


if __name__ == "__main__":
    main()
