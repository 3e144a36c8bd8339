"""Sleep and changes of the network are reported once, and nothing else is."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from gpumesh.tunnels.local_system.network_watch import MIN_SLEEP_S, total_sleep_s, watch_network, watch_sleep
from tests.prerequisites import needs

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's kernel")


class Clocks:
    """A machine's two clocks, read once in each tick. A step is (seconds that passed, seconds slept of them)."""

    def __init__(self, *steps: tuple[float, float]) -> None:
        self._steps = [(0.0, 0.0), *steps]
        self.ticks = 0
        self.over = asyncio.Event()
        self._slept = self._now = 0.0

    def slept(self) -> float:
        if self.ticks < len(self._steps):
            passed, slept = self._steps[self.ticks]
            self._slept += slept
            self._now += passed - slept  # this clock stands still in sleep
        else:
            self.over.set()
        self.ticks += 1
        return self._slept

    def clock(self) -> float:
        return self._now


async def reported_wakes(*steps: tuple[float, float], tick_s: float = 1e-3) -> list[int]:
    """The steps (from 1) at which a wake was reported."""
    clocks = Clocks(*steps)
    reported: list[int] = []
    watch = asyncio.create_task(
        watch_sleep(lambda: reported.append(clocks.ticks - 1), slept=clocks.slept, clock=clocks.clock, tick_s=tick_s)
    )
    await asyncio.wait_for(clocks.over.wait(), 10)
    watch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watch
    return reported


async def test_a_sleep_is_reported_once() -> None:
    assert await reported_wakes((1, 0), (3600, 3599), (1, 0), (1, 0)) == [2]


async def test_a_stopped_process_counts_as_a_sleep() -> None:
    """SIGSTOP, or a virtual machine that was paused: no clock tells, but the tick comes late."""
    assert await reported_wakes((1, 0), (60, 0), (1, 0)) == [2]


async def test_a_short_delay_is_not_reported() -> None:
    assert await reported_wakes((1, 0), (MIN_SLEEP_S - 0.1, 0), (MIN_SLEEP_S - 0.1, MIN_SLEEP_S - 0.1), (1, 0)) == []


async def test_each_sleep_is_reported() -> None:
    assert await reported_wakes((600, 599), (600, 599), (1, 0), (MIN_SLEEP_S + 2, MIN_SLEEP_S + 1)) == [1, 2, 4]


def test_this_machine_has_not_slept_meanwhile() -> None:
    assert abs(total_sleep_s() - total_sleep_s()) < 1.0


WATCH = """
import asyncio, sys
from gpumesh.tunnels.local_system.network_watch import watch_network

async def main():
    changed = asyncio.Event()
    watch = asyncio.create_task(watch_network(changed.set))
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print("ready", changed.is_set(), flush=True)
    while await reader.readline():  # each line: something was changed
        await asyncio.wait_for(changed.wait(), 20)
        changed.clear()
        print("reported", flush=True)
    watch.cancel()

asyncio.run(main())
"""


@linux_only
@needs("netns")
@pytest.mark.real
@pytest.mark.slow
async def test_changes_of_links_addresses_and_routes_are_reported() -> None:
    """In a network namespace of its own, which ends with its process."""
    watcher = await asyncio.create_subprocess_exec(
        "unshare", "-n", sys.executable, "-c", WATCH,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert watcher.stdin is not None
    assert watcher.stdout is not None
    async with asyncio.timeout(50):
        assert await watcher.stdout.readline() == b"ready False\n"
        for change in (
            "link set lo up",
            "link add gm0 type veth peer name gm1",
            "link set gm0 up",
            "addr add 192.0.2.1/24 dev gm0",
            "route add 198.51.100.0/24 via 192.0.2.2",
            "addr add 2001:db8::1/64 dev gm0",
            "link set gm0 down",
        ):
            command = ["nsenter", "-t", str(watcher.pid), "-n", "ip", *change.split()]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=False, timeout=20)
            assert done.returncode == 0, (change, done.stderr)
            watcher.stdin.write(b"changed\n")
            assert await watcher.stdout.readline() == b"reported\n", change
        watcher.stdin.close()
        await watcher.wait()


async def test_without_kernel_events_it_only_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError("as a sandbox would")

    for answer in (forbidden, lambda: None):
        monkeypatch.setattr("gpumesh.tunnels.local_system.network_watch._open_kernel_events", answer)
        watch = asyncio.create_task(watch_network(lambda: pytest.fail("nothing changed")))
        done, _ = await asyncio.wait({watch}, timeout=0.05)
        assert not done
        watch.cancel()
