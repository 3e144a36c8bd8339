"""Runs commands on this machine without a shell: nvidia-smi for a direct node, and a user's ``address_from``.

Each command has its own process group. The group is killed at the end of the block that started it, so that no process
is left behind. Commands get the user's environment without the secrets that mesh.yaml names. A provider's key that
``address_from`` needs is not such a secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence
from typing import IO

from gpumesh.config import environment

CHUNK_BYTES = 32 * 1024  # the most that one read of a pipe takes
END_TIMEOUT_S = 2.0  # the time for a killed command to end and to close its pipes


@contextlib.asynccontextmanager
async def local_command(
    argv: Sequence[str], *, stdin: IO[bytes] | None = None, stderr: bool | IO[bytes] = True
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs the command during the block, to which it gives the process. ``stdin``: the file that the command reads;
    ``None``: an empty one. ``stderr``: a pipe for it, or the file that gets it; false: it is dropped.

    Raises OSError or ValueError (a NUL in an argument) when the command cannot be started.
    """
    stderr_target: int | IO[bytes]
    if isinstance(stderr, bool):
        stderr_target = asyncio.subprocess.PIPE if stderr else asyncio.subprocess.DEVNULL
    else:
        stderr_target = stderr
    start_task = asyncio.create_task(
        asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr_target,
            env=environment.child_environment(),
            start_new_session=True,
        )
    )
    try:
        process = await asyncio.shield(start_task)
    except asyncio.CancelledError:
        # ``shield`` lets the start go on: a cancelled start would make asyncio kill the process, but not its children.
        # So the start is awaited here, and then the whole group is killed. A start that fails leaves nothing.
        with contextlib.suppress(OSError, ValueError):
            await kill_group(await start_task)
        raise
    try:
        yield process
    finally:
        await kill_group(process)


async def kill_group(process: asyncio.subprocess.Process) -> None:
    """Kills the process and all processes that it started, and waits for its end."""
    # Nothing in the group runs any more: ProcessLookupError, on macOS perhaps PermissionError.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await release_process(process, END_TIMEOUT_S)


async def wait_for_exit(process: asyncio.subprocess.Process) -> None:
    """Waits for the process's end, and drops its output.

    The output has to be read, because asyncio reports the end only after the pipes have ended.
    """
    for pipe in (process.stdout, process.stderr):
        while pipe is not None and await pipe.read(CHUNK_BYTES):
            pass
    await process.wait()


async def release_process(process: asyncio.subprocess.Process, timeout_s: float) -> None:
    """Waits at most ``timeout_s`` until a process that was told to end, and its pipes, have ended. Then closes the
    pipes, because a child of the process may still hold them."""
    try:
        async with asyncio.timeout(timeout_s):
            await wait_for_exit(process)
    except TimeoutError:
        process._transport.close()  # type: ignore[attr-defined]  # asyncio has no other way


def exit_status(process: asyncio.subprocess.Process) -> int | None:
    """The exit status of a process that has ended; ``None`` when a signal ended it, or when it still runs."""
    status = process.returncode
    if status is None or status < 0:  # negative: the number of the signal
        return None
    return status


async def read_at_most(pipe: asyncio.StreamReader | None, limit: int) -> tuple[bytes, bool]:
    """Reads a pipe to its end. Returns the first ``limit`` bytes, and whether there were more.

    The rest is read and dropped, so that the command can end.
    """
    assert pipe is not None, "the command was started without this pipe"
    output = bytearray()
    truncated = False
    while piece := await pipe.read(CHUNK_BYTES):
        room = limit - len(output)
        if len(piece) > room:
            truncated = True
        output += piece[:room]
    return bytes(output), truncated
