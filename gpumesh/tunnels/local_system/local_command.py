"""Commands on this machine: nvidia-smi of a direct node, and a user's ``address_from``. No shell, and nothing of them
is left behind: each has a process group of its own, which ends with the block that started it. They are given the
user's environment without the secrets that mesh.yaml names: what `address_from` needs (a provider's key) is its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence

from gpumesh.config import environment

CHUNK_BYTES = 32 * 1024
END_S = 2.0


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
        # Cancelled in there, asyncio would kill what it has begun, and leave alone what that has begun.
        with contextlib.suppress(OSError, ValueError):
            await _end(await starting)
        raise
    try:
        yield process
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await release_process(process, END_S)


async def wait_for_exit(process: asyncio.subprocess.Process) -> None:
    """Waits for it, and drops what it says: asyncio holds a process for alive until its pipes are read to their end."""
    for pipe in (process.stdout, process.stderr):
        while pipe is not None and await pipe.read(CHUNK_BYTES):
            pass
    await process.wait()


async def release_process(process: asyncio.subprocess.Process, patience_s: float) -> None:
    """Of a process that was told to end. Its pipes are closed after ``patience_s``, should something that it started
    hold them open."""
    try:
        async with asyncio.timeout(patience_s):
            await wait_for_exit(process)
    except TimeoutError:
        process._transport.close()  # type: ignore[attr-defined]  # asyncio has no other way


async def read_at_most(pipe: asyncio.StreamReader | None, limit: int) -> tuple[bytes, bool]:
    """All that fits, and whether something did not; the rest is read and dropped, so that the command can end."""
    assert pipe is not None
    kept, cut = bytearray(), False
    while piece := await pipe.read(CHUNK_BYTES):
        room = limit - len(kept)
        cut |= len(piece) > room
        kept += piece[: max(0, room)]
    return bytes(kept), cut
