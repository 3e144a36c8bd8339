"""Commands on this machine: nvidia-smi of a direct node, and a user's ``address_from``. No shell.

Each command has its own process group, which is killed at the end of the block that started it, so that nothing is left
behind. Commands get the user's environment without the secrets that mesh.yaml names; a provider's key that
``address_from`` needs is not one of those.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence

from gpumesh.config import environment

CHUNK_BYTES = 32 * 1024
END_TIMEOUT_S = 2.0


@contextlib.asynccontextmanager
async def local_command(argv: Sequence[str], *, stderr: bool = True) -> AsyncIterator[asyncio.subprocess.Process]:
    """Raises OSError or ValueError (a NUL in an argument) when it cannot be started."""
    starting = asyncio.create_task(
        asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE if stderr else asyncio.subprocess.DEVNULL,
            env=environment.child_environment(),
            start_new_session=True,
        )
    )
    try:
        process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        # A cancellation inside asyncio would kill the process it has started, but not that process's children.
        with contextlib.suppress(OSError, ValueError):
            await _kill_group(await starting)
        raise
    try:
        yield process
    finally:
        await _kill_group(process)


async def _kill_group(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await release_process(process, END_TIMEOUT_S)


async def wait_for_exit(process: asyncio.subprocess.Process) -> None:
    """Waits for the process's end and drops its output: for asyncio, a process lives until its pipes are read to their
    end."""
    for pipe in (process.stdout, process.stderr):
        while pipe is not None and await pipe.read(CHUNK_BYTES):
            pass
    await process.wait()


async def release_process(process: asyncio.subprocess.Process, timeout_s: float) -> None:
    """Waits for a process that was told to end. After ``timeout_s`` its pipes are closed: a child of it may still hold
    them open."""
    try:
        async with asyncio.timeout(timeout_s):
            await wait_for_exit(process)
    except TimeoutError:
        process._transport.close()  # type: ignore[attr-defined]  # asyncio has no other way


def exit_status(process: asyncio.subprocess.Process) -> int | None:
    """The exit status of a process that has ended; ``None`` when a signal ended it."""
    return process.returncode if process.returncode is not None and process.returncode >= 0 else None


async def read_at_most(pipe: asyncio.StreamReader | None, limit: int) -> tuple[bytes, bool]:
    """The first ``limit`` bytes, and whether there were more. More is read and dropped, so that the command can end."""
    assert pipe is not None
    kept, truncated = bytearray(), False
    while piece := await pipe.read(CHUNK_BYTES):
        room = limit - len(kept)
        truncated |= len(piece) > room
        kept += piece[: max(0, room)]
    return bytes(kept), truncated
