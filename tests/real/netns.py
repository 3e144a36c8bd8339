"""A network of a test's own: a namespace with one cable to it, and what can go wrong on that cable.

The namespace lives as long as its first process, which the kernel ends with the test's; so nothing is left behind,
whatever happened to the test. Its processes must be started with ``prefix`` (they end the same way).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Self

from tests.prerequisites import program

LINE = Path(__file__).with_name("long_line.py")
_LIMIT_S = 20.0
_CLONE_NEWNET = 0x40000000  # sched.h; os.unshare and os.setns need Python 3.12

# Whatever comes in or goes out passes these two; a rule in them is a fault.
_TABLE = """
table inet faults {
    chain in { type filter hook input priority 0; policy accept; }
    chain out { type filter hook output priority 0; policy accept; }
}
"""


@contextlib.contextmanager
def private_network() -> Iterator[None]:
    """Until the context ends, this thread and all processes and threads that it starts have their own loopback and no
    other interface. A test may then change its network while other tests run: their network watches notice nothing.

    The thread must be the process's main thread, because ``/proc/self/net`` shows the main thread's namespace. Needs
    root.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as outside:
        _check_errno(libc.unshare(_CLONE_NEWNET))
        try:
            subprocess.run([_program_path("ip"), "link", "set", "lo", "up"], check=True, timeout=_LIMIT_S)
            yield
        finally:
            _check_errno(libc.setns(outside.fileno(), _CLONE_NEWNET))


def _check_errno(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Namespace:
    """An async context manager. ``here`` is this machine's end of the cable, ``there`` the namespace's: addresses of
    10.213.NUMBER.0/25; the other half of that /24 is free for another link."""

    def __init__(self) -> None:
        self.number = -1
        self._first: subprocess.Popen[bytes] | None = None

    @property
    def here(self) -> str:
        return f"10.213.{self.number}.1"

    @property
    def there(self) -> str:
        return f"10.213.{self.number}.2"

    @property
    def pid(self) -> int:
        """The namespace, as ``ip link set … netns`` takes it."""
        assert self._first is not None
        return self._first.pid

    @property
    def prefix(self) -> tuple[str, ...]:
        """Before a command: it runs in the namespace, and ends when the thread that started it does."""
        return (*_ending_with_us(), _program_path("nsenter"), f"--net=/proc/{self.pid}/ns/net", "--")

    async def __aenter__(self) -> Self:
        self._first = subprocess.Popen(
            [*_ending_with_us(), _program_path("unshare"), "--net", "--", "sleep", "infinity"], stdin=subprocess.DEVNULL
        )
        try:
            await self._entered()
            await self._lay_cable()
            await self.command("nft", "-f", "-", text=_TABLE)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._first is not None:
            self._first.kill()
            await asyncio.to_thread(self._first.wait)
            self._first = None
        if self.number >= 0:
            # It goes with its other end, but a little later; the next test may want the number.
            with contextlib.suppress(subprocess.CalledProcessError):
                await run("ip", "link", "delete", f"gmtest{self.number}")

    async def _entered(self) -> None:
        """Until ``unshare`` has made the namespace: before that the process is still in ours."""
        ours = os.readlink("/proc/self/ns/net")
        async with asyncio.timeout(_LIMIT_S):
            while os.readlink(f"/proc/{self.pid}/ns/net") == ours:
                await asyncio.sleep(0.005)

    async def _lay_cable(self) -> None:
        """The kernel refuses a name that is taken, so other tests at the same time get other numbers."""
        numbers = random.sample(range(256), 256)
        for number in numbers:
            name = f"gmtest{number}"
            try:
                await run("ip", "link", "add", name, "type", "veth", "peer", "name", "cable", "netns", str(self.pid))
            except subprocess.CalledProcessError:
                if number == numbers[-1]:
                    raise
                continue
            self.number = number
            break
        await run("ip", "address", "add", f"{self.here}/25", "dev", name)
        await run("ip", "link", "set", name, "up")
        await self.command("ip", "address", "add", f"{self.there}/25", "dev", "cable")
        await self.command("ip", "link", "set", "cable", "up")
        await self.command("ip", "link", "set", "lo", "up")

    async def command(self, name: str, *arguments: str, text: str | None = None) -> str:
        """Runs a program in the namespace; what it printed. Raises ``CalledProcessError``."""
        return await run(name, *arguments, text=text, prefix=self.prefix)

    def processes(self) -> set[int]:
        """All that run in it, but for the one that holds it."""
        if self._first is None:
            return set()
        with contextlib.suppress(OSError):
            inside = os.readlink(f"/proc/{self.pid}/ns/net")
            return {pid for pid in _running() if pid != self.pid and _namespace_of(pid) == inside}
        return set()

    # -- faults ------------------------------------------------------------------------------------------------------

    async def swallow(self) -> None:
        """A black hole: no packet comes in or goes out, and nobody is told."""
        await self._rules('iifname "cable" drop', 'oifname "cable" drop')

    async def heal(self) -> None:
        """Ends what ``swallow`` began."""
        await self._rules()

    async def reset(self, port: int) -> None:
        """Resets all connections to this port of the namespace: each end gets an RST."""
        await self.command("ss", "--kill", "--tcp", "state", "established", "sport", "=", f":{port}")

    async def pull_out(self) -> None:
        """The cable, at the far end: here the link has no carrier any more, and the kernel tells of it."""
        await self.command("ip", "link", "set", "cable", "down")

    async def plug_in(self) -> None:
        await self.command("ip", "link", "set", "cable", "up")

    @contextlib.asynccontextmanager
    async def long_line(self, *, round_trip_s: float, lost_of_1000: int) -> AsyncIterator[str]:
        """A second way into the namespace, over a long and lossy line; the namespace's address on it."""
        here, there = f"gmline{self.number}", "line"
        process = await asyncio.create_subprocess_exec(
            *(*_ending_with_us(), sys.executable, str(LINE)),
            *(here, f"gmfar{self.number}", str(round_trip_s), str(lost_of_1000)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_LIMIT_S):
                assert await process.stdout.readline(), "no line; does this kernel have tun?"
            await run("ip", "link", "set", f"gmfar{self.number}", "name", there, "netns", str(self.pid))
            await run("ip", "address", "add", f"10.213.{self.number}.129/25", "dev", here)
            await run("ip", "link", "set", here, "up")
            await self.command("ip", "address", "add", f"10.213.{self.number}.130/25", "dev", there)
            await self.command("ip", "link", "set", there, "up")
            yield f"10.213.{self.number}.130"
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    async def _rules(self, incoming: str = "", outgoing: str = "") -> None:
        rules = [("in", incoming), ("out", outgoing)]
        lines = ["flush table inet faults", *(f"add rule inet faults {chain} {rule}" for chain, rule in rules if rule)]
        await self.command("nft", "-f", "-", text="\n".join(lines))


async def run(name: str, *arguments: str, text: str | None = None, prefix: Iterable[str] = ()) -> str:
    """A program of the system; what it printed. Raises ``CalledProcessError`` with its complaint."""
    process = await asyncio.create_subprocess_exec(
        *prefix,
        _program_path(name),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL if text is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(_LIMIT_S):
        out, err = await process.communicate(None if text is None else text.encode())
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, [name, *arguments], out, err)
    return out.decode()


def _program_path(name: str) -> str:
    path = program(name)
    assert path is not None, f"{name} is not installed"
    return path


def _ending_with_us() -> tuple[str, ...]:
    return (_program_path("setpriv"), "--pdeathsig", "KILL", "--")


def _running() -> Iterable[int]:
    return (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit())


def _namespace_of(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None
