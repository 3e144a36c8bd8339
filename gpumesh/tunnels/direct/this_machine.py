"""Finds the owners of local ports and runs commands on this machine, once for all nodes whose servers run on it.

Each such node asks every two seconds which process listens on its port, and runs nvidia-smi. If nodes did not share the
answers, a hundred nodes on loopback would start a hundred threads and a hundred processes at once, and hold up the
event loop for two seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from gpumesh.tunnels import blocking
from gpumesh.tunnels.base import ExecResult
from gpumesh.tunnels.direct.port_owners import HostPort, PortOwner, PortOwnerLookup
from gpumesh.tunnels.local_system.local_command import exit_status, local_command, read_at_most

MAX_AGE_S = 1.0  # how old a shared answer may be
MAX_SHARED_COMMANDS = 64  # far more than the different commands that we share; a limit in case that changes

T = TypeVar("T")


class ThisMachine:
    """Answers questions about this machine; one object for all nodes of a mesh. ``clock``: monotonic seconds."""

    def __init__(self, ports: PortOwnerLookup | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ports = PortOwnerLookup() if ports is None else ports
        self._clock = clock
        self._addresses: set[HostPort] = set()  # each look-up covers all of these
        self._shared_owners = SharedResult(self._find_owners, clock)
        self._shared_commands: dict[tuple[str, ...], SharedResult[ExecResult]] = {}  # by argument list

    def register_port(self, host: str, port: int) -> None:
        """Adds the address to each look-up from now on, so that a later ``find_owner`` finds its answer ready."""
        self._addresses.add((host, port))

    async def find_owner(self, host: str, port: int) -> PortOwner:
        """Finds out whether the server at the port runs on this machine. ``host``: a loopback address or localhost."""
        self.register_port(host, port)
        owners = await self._shared_owners.get()
        if (host, port) not in owners:  # this look-up began before the address was registered; the next one has it
            owners = await self._shared_owners.get(refresh=True)
        return owners[host, port]

    async def _find_owners(self) -> dict[HostPort, PortOwner]:
        return await blocking.run_in_thread(self._ports.find_owners, frozenset(self._addresses))

    async def run_shared_command(self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int) -> ExecResult:
        """Runs a command that changes nothing, or returns a result that is at most ``MAX_AGE_S`` old. Raises as
        ``run_command``.

        Calls with the same ``argv`` and ``limit_bytes`` share a result. The first such call's ``timeout_s`` is used for
        all of them.
        """
        key = (*argv, str(limit_bytes))
        shared = self._shared_commands.get(key)
        if shared is None:
            if len(self._shared_commands) > MAX_SHARED_COMMANDS:
                self._shared_commands.clear()
            shared = SharedResult(lambda: run_command(argv, timeout_s=timeout_s, limit_bytes=limit_bytes), self._clock)
            self._shared_commands[key] = shared
        return await shared.get()


class SharedResult(Generic[T]):
    """Gives all callers of about the same time one answer, which ``ask`` returns. When the last caller that waits is
    cancelled, ``ask`` is cancelled too."""

    def __init__(self, ask: Callable[[], Awaitable[T]], clock: Callable[[], float]) -> None:
        self._ask = ask
        self._clock = clock
        self._task: asyncio.Task[T] | None = None  # the last call of ``ask``, which may still run
        self._waiting_callers = 0  # the callers of ``get`` that wait for ``_task``
        self._answered_at = 0.0  # when the last answer came, by ``clock``

    async def get(self, *, refresh: bool = False) -> T:
        """Returns an answer that is at most ``MAX_AGE_S`` old, waits for a running ``ask``, or calls ``ask`` again.

        ``refresh``: does not use an earlier answer, but waits for a running ``ask``. Raises the errors of ``ask``; an
        error is not kept for later callers.
        """
        task = self._task
        is_old_answer = task is not None and task.done() and (refresh or self._is_too_old())
        if task is None or is_old_answer:
            task = self._task = asyncio.create_task(self._ask_once(), name="this machine")
            self._waiting_callers = 0
        self._waiting_callers += 1
        try:
            return await asyncio.shield(task)  # a caller that is cancelled does not cancel the others' task
        finally:
            if task is self._task:  # otherwise a newer task has its own count of callers
                self._waiting_callers -= 1
                if not self._waiting_callers and not task.done():  # the last caller was cancelled, too
                    self._task = None
                    task.cancel()
                    await asyncio.wait([task])

    def _is_too_old(self) -> bool:
        return self._clock() - self._answered_at > MAX_AGE_S

    async def _ask_once(self) -> T:
        """Calls ``ask`` and notes the time of the answer. An error is forgotten, so that the next caller asks again."""
        try:
            answer = await self._ask()
        except BaseException:
            if self._task is asyncio.current_task():  # otherwise a newer task has taken the place already
                self._task = None
            raise
        self._answered_at = self._clock()
        return answer


async def run_command(argv: Sequence[str], *, timeout_s: float, limit_bytes: int) -> ExecResult:
    """Runs a command on this machine and returns its exit status and output, of each stream at most ``limit_bytes``.

    Raises TimeoutError, and OSError or ValueError when the command cannot be started.
    """
    async with local_command(argv) as process, asyncio.timeout(timeout_s):
        (stdout, stdout_cut), (stderr, stderr_cut), _status = await asyncio.gather(
            read_at_most(process.stdout, limit_bytes),
            read_at_most(process.stderr, limit_bytes),
            process.wait(),
        )
        return ExecResult(exit_status(process), stdout, stderr, truncated=stdout_cut or stderr_cut)
