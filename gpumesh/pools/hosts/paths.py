"""Measures the ways of the data between the head and a worker: the round trip, and how fast weights get there.

Through us, the data goes over both tunnels, one after the other: their round trips add up, and the slower one limits
the weights. From head to worker, the head's host logs in to the worker (``worker_login.py``).

A small script on the far end answers each of our commands with a line. So our clock is enough.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from gpumesh.errors import ExecError
from gpumesh.pools.base import PathKind, WorkerPath
from gpumesh.pools.hosts.route import HostRoute
from gpumesh.pools.hosts.worker_login import WorkerLogin, login_argv
from gpumesh.tunnels.base import OutputStream, ProgramStream

TIMEOUT_S = 30.0  # for one way
TURNS = 10
SMALL_BYTES = 64 << 10
MEDIUM_BYTES = 1 << 20
LARGE_BYTES = 16 << 20
QUICK_S = 0.2  # a way that takes less for MEDIUM_BYTES is measured with LARGE_BYTES
_PIECE = bytes(64 << 10)

# The first line of both scripts. What comes before it was written by a login shell.
_READY = "@gpumesh@ ready"
# Answers "turns N" at once, takes N bytes after "up N", sends N bytes after "down N"; then comes a line "k".
_ECHO_SCRIPT = (
    f'echo "{_READY}"; '
    "while read -r c n; do case $c in up) head -c $n >/dev/null;; down) head -c $n /dev/zero;; esac; echo k; done"
)
# The same on the head, for its way to a worker, on which _ECHO_SCRIPT runs: does N turns, or sends N bytes there. The
# FIFOs are open in both directions, so that opening them waits for nobody.
_RELAY_SCRIPT = (
    'mkfifo "$d/in" "$d/out" && exec 5<>"$d/in" 6<>"$d/out" || exit 1; '
    '"$@" <&5 >&6 & s=$! ; '
    "turn() { echo $1 $2 >&5; }; finish() { read -r l <&6; }; "
    f'while read -r l <&6; do case $l in *"{_READY}") break;; esac; done; echo "{_READY}"; '
    "while read -r c n; do case $c in "
    "turns) while [ $n -gt 0 ]; do turn turns 0; finish; n=$((n-1)); done;; "
    "up) turn up $n; head -c $n /dev/zero >&5; finish;; esac; echo k; done; kill $s; exit 0"
)


class _EchoProgram:
    """One of the two scripts on a host. Each call is one command, and returns the seconds until its answer."""

    def __init__(self, stream: ProgramStream, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock

    async def turn(self, count: int = 0) -> float:
        return await self._measure(b"turns %d\n" % count)

    async def tell_up(self, count: int) -> float:
        """The other end sends ``count`` bytes to an end behind it."""
        return await self._measure(b"up %d\n" % count)

    async def send_up(self, count: int) -> float:
        """We send ``count`` bytes to the other end."""
        return await self._measure(b"up %d\n" % count, sent=count)

    async def fetch_down(self, count: int) -> float:
        """The other end sends ``count`` bytes to us."""
        return await self._measure(b"down %d\n" % count, fetched=count)

    async def _measure(self, command: bytes, *, sent: int = 0, fetched: int = 0) -> float:
        """The seconds from the command, with ``sent`` bytes after it, to the answer, with ``fetched`` bytes before."""
        started_at = self._clock()
        await self._stream.write(command)
        for _ in range(sent // len(_PIECE)):
            await self._stream.write(_PIECE)
        await self._read_answer(fetched)
        return self._clock() - started_at

    async def wait_ready(self) -> None:
        """Waits for the script's first line. Raises ExecError when the script does not start."""
        output, ready = b"", _READY.encode() + b"\n"
        while ready not in output:
            output = output[-len(ready) :] + await self._read()

    async def _read_answer(self, count: int) -> None:
        """Reads ``count`` bytes and the line "k". Raises ExecError when the script has ended."""
        missing = count + len(b"k\n")
        while missing > 0:
            missing -= len(await self._read())

    async def _read(self) -> bytes:
        """The next piece of the script's output; empty for one of its errors."""
        chunk = await self._stream.read()
        if chunk.ended:
            raise ExecError("the script that measures a way has ended")
        return chunk.data if chunk.stream is OutputStream.STDOUT else b""


async def measure_through_us(
    head: HostRoute,
    worker: HostRoute,
    *,
    clock: Callable[[], float] = time.monotonic,
    timeout_s: float = TIMEOUT_S,
) -> WorkerPath:
    """The way from the head through this machine to the worker. The two parts are measured one after the other.

    Raises TunnelDown, and ExecError when a host does not answer in time.
    """
    async with _deadline(timeout_s), _open_echo(head, ("sh", "-c", _ECHO_SCRIPT), clock) as echo:
        head_rtt_s = await _find_shortest_turn(echo)
        down = await _measure_rate(echo.fetch_down)
    async with _deadline(timeout_s), _open_echo(worker, ("sh", "-c", _ECHO_SCRIPT), clock) as echo:
        worker_rtt_s = await _find_shortest_turn(echo)
        up = await _measure_rate(echo.send_up)
    return WorkerPath(PathKind.THROUGH_US, round((head_rtt_s + worker_rtt_s) * 1000, 3), min(down, up))


async def measure_head_to_worker(
    head: HostRoute,
    login: WorkerLogin,
    *,
    clock: Callable[[], float] = time.monotonic,
    timeout_s: float = TIMEOUT_S,
) -> WorkerPath:
    """The way from the head straight to the worker, where ``may_log_in`` has found one. Raises as
    ``measure_through_us``."""
    command = shlex.join(("exec", "sh", "-c", _ECHO_SCRIPT))
    argv = login_argv(login, _RELAY_SCRIPT, command)
    async with _deadline(timeout_s), _open_echo(head, argv, clock) as echo:
        own_turn_s = await _find_shortest_turn(echo)
        turns_s = await echo.turn(TURNS)
        rate = await _measure_rate(echo.tell_up)
    rtt_ms = max(turns_s - own_turn_s, 0.0) / TURNS * 1000
    return WorkerPath(PathKind.HEAD_TO_WORKER, round(rtt_ms, 3), rate)


@asynccontextmanager
async def _open_echo(
    route: HostRoute, argv: tuple[str, ...], clock: Callable[[], float]
) -> AsyncIterator[_EchoProgram]:
    """Runs one of the scripts during the block."""
    stream = await route.open_program(argv)
    echo = _EchoProgram(stream, clock)
    try:
        await echo.wait_ready()
        yield echo
    finally:
        await stream.close()


@asynccontextmanager
async def _deadline(timeout_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise ExecError(f"a way between two members could not be measured within {timeout_s:g} s") from error


async def _find_shortest_turn(echo: _EchoProgram) -> float:
    """The shortest of several round trips: the others waited for something else, too."""
    return min([await echo.turn() for _ in range(TURNS)])


async def _measure_rate(send: Callable[[int], Awaitable[float]]) -> float:
    """The bytes per second by which more bytes take longer, so that the round trip does not count."""
    small_s = await send(SMALL_BYTES)
    count, took_s = MEDIUM_BYTES, await send(MEDIUM_BYTES)
    if took_s < QUICK_S:
        count, took_s = LARGE_BYTES, await send(LARGE_BYTES)
    return (count - SMALL_BYTES) / max(took_s - small_s, 1e-4)
