"""Commands on this machine: output, limits, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from gpumesh.tunnels.local_system.local_command import local_command, read_at_most
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.supervised import descriptors


async def test_output_and_status() -> None:
    async with local_command(["sh", "-c", "cat; echo out; echo err >&2; exit 3"]) as process:
        out, err = await asyncio.gather(read_at_most(process.stdout, 100), read_at_most(process.stderr, 100))
        assert await process.wait() == 3
    assert (out, err) == ((b"out\n", False), (b"err\n", False))


async def test_output_beyond_the_limit_is_dropped_and_the_command_can_end() -> None:
    async with local_command(["head", "-c", "5000000", "/dev/zero"], stderr=False) as process:
        assert process.stderr is None
        output, truncated = await read_at_most(process.stdout, 1000)
        assert (len(output), truncated) == (1000, True)
        assert await process.wait() == 0
    async with local_command(["head", "-c", "1000", "/dev/zero"]) as process:
        assert await read_at_most(process.stdout, 1000) == (bytes(1000), False)


async def test_leaving_the_block_ends_the_command_and_its_children() -> None:
    before = descriptors()
    for _ in range(3):
        async with local_command(["sh", "-c", "trap '' TERM; (sleep 600 & echo $$ $!; wait) & wait"]) as process:
            assert process.stdout is not None
            pids = [int(pid) for pid in (await process.stdout.readline()).split()]
            assert all(alive(pid) for pid in pids)
        await wait_until(lambda pids=pids: not any(alive(pid) for pid in pids), f"the end of {pids}")  # type: ignore[misc]
    await wait_until(lambda: descriptors() == before, "all descriptors closed")


def is_running(mark: str) -> bool:
    command_lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command_lines.append((folder / "cmdline").read_text())
    return any(mark in line for line in command_lines)


async def test_a_cancelled_start_leaves_no_process_and_no_descriptor() -> None:
    """asyncio starts the process and then waits for its pipes. A cancellation there must also end its children."""
    before = descriptors()
    for steps in range(16):
        mark = f"600.{os.getpid()}{steps:02}"

        async def run(mark: str = mark) -> None:
            async with local_command(["sh", "-c", f"sleep {mark} & wait"]):
                await asyncio.Event().wait()

        task = asyncio.create_task(run())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until(lambda mark=mark: not is_running(mark), "the command ended")  # type: ignore[misc]
    await wait_until(lambda: descriptors() == before, "all descriptors closed")


async def test_a_grandchild_in_another_process_group_is_not_waited_for() -> None:
    """It keeps the pipe open. Leaving the block waits for it a moment, not for its ten minutes."""
    async with asyncio.timeout(20):
        async with local_command(["setsid", "-f", "sh", "-c", "echo $$; exec sleep 600"]) as process:
            assert process.stdout is not None
            pid = int(await process.stdout.readline())
    os.kill(pid, 9)


async def test_commands_that_cannot_be_started() -> None:
    for argv, error in ((["gpumesh-no-such-command"], FileNotFoundError), (["a\0b"], ValueError)):
        with pytest.raises(error):
            async with local_command(argv):
                pass
