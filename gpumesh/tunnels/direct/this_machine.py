"""What the nodes whose servers run here ask of this machine, asked once for all of them.

Each node asks every two seconds who listens on its port, and what nvidia-smi says. With a hundred nodes on loopback
that was a hundred threads and a hundred processes at once, and the event loop stood still for two seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from gpumesh.tunnels import blocking
from gpumesh.tunnels.base import ExecResult
from gpumesh.tunnels.direct.port_owners import HostPort, PortOwner, PortOwnerLookup
from gpumesh.tunnels.local_system.local_command import local_command, read_at_most

MAX_AGE_S = 1.0  # how old an answer may be, so that those who ask a little later are given it too

T = TypeVar("T")


class ThisMachine:
    """One for a mesh. ``clock`` gives monotonic seconds."""

    def __init__(self, ports: PortOwnerLookup | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ports = PortOwnerLookup() if ports is None else ports
        self._clock = clock
        self._places: set[HostPort] = set()
        self._owners = SharedResult(self._look, clock)
        self._answers: dict[tuple[str, ...], SharedResult[ExecResult]] = {}

    def register_port(self, host: str, port: int) -> None:
        """``find_owner`` will be asked for this place: it is looked for whenever any is."""
        self._places.add((host, port))

    async def find_owner(self, host: str, port: int) -> PortOwner:
        """Of the process that listens there; ``host`` is a loopback address or ``localhost``."""
        self.register_port(host, port)
        owners = await self._owners.get()
        return owners.get((host, port)) or (await self._owners.get(refresh=True))[host, port]

    async def _look(self) -> dict[HostPort, PortOwner]:
        return await blocking.run_in_thread(self._ports.find_owners, frozenset(self._places))

    async def run_shared_command(self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int) -> ExecResult:
        """To a command that changes nothing. Raises what ``run_command`` raises."""
        key = (*argv, str(limit_bytes))
        shared = self._answers.get(key)
        if shared is None:
            if len(self._answers) > 64:  # no question of ours has so many forms
                self._answers.clear()
            shared = SharedResult(lambda: run_command(argv, timeout_s=timeout_s, limit_bytes=limit_bytes), self._clock)
            self._answers[key] = shared
        return await shared.get()


class SharedResult(Generic[T]):
    """One answer for all who ask at about the same time. What is asked ends with the last who waits for it."""

    def __init__(self, ask: Callable[[], Awaitable[T]], clock: Callable[[], float]) -> None:
        self._ask = ask
        self._clock = clock
        self._task: asyncio.Task[T] | None = None
        self._waiting = 0
        self._answered = 0.0

    async def get(self, *, refresh: bool = False) -> T:
        """``refresh``: what was answered before will not do. Raises what ``ask`` raises, and that is not kept."""
        task = self._task
        if task is None or (task.done() and (refresh or self._clock() - self._answered > MAX_AGE_S)):
            task = self._task = asyncio.create_task(self._once(), name="this machine")
            self._waiting = 0
        self._waiting += 1
        try:
            return await asyncio.shield(task)
        finally:
            if task is self._task:
                self._waiting -= 1
                if not self._waiting and not task.done():
                    self._task = None
                    task.cancel()
                    await asyncio.wait([task])

    async def _once(self) -> T:
        try:
            answer = await self._ask()
        except BaseException:
            if self._task is asyncio.current_task():
                self._task = None
            raise
        self._answered = self._clock()
        return answer


async def run_command(argv: Sequence[str], *, timeout_s: float, limit_bytes: int) -> ExecResult:
    """A command on this machine. Raises TimeoutError, OSError and ValueError."""
    async with local_command(argv) as process, asyncio.timeout(timeout_s):
        (out, cut_out), (err, cut_err), _status = await asyncio.gather(
            read_at_most(process.stdout, limit_bytes),
            read_at_most(process.stderr, limit_bytes),
            process.wait(),
        )
        return ExecResult(exit_status(process), out, err, truncated=cut_out or cut_err)


def exit_status(process: asyncio.subprocess.Process) -> int | None:
    return process.returncode if process.returncode is not None and process.returncode >= 0 else None
