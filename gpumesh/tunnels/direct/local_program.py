"""A program with an input on this machine, for a node without SSH: ``Tunnel.open_program``."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence

from gpumesh.config import environment
from gpumesh.errors import ExecError
from gpumesh.tunnels.base import PROGRAM_END_S, ExecChunk, OutputStream
from gpumesh.tunnels.local_system.local_command import CHUNK_BYTES, exit_status, kill_group, wait_for_exit

QUEUED_PIECES = 16  # pieces of output, of ``CHUNK_BYTES`` at most, that wait for the reader; then the program waits


class LocalProgram:
    """See ``base.ProgramStream``. The program has its own process group.

    When our process is killed, the program's input ends, because only our process holds the other end.
    """

    def __init__(self, process: Process, node: str) -> None:
        self._process = process
        self._node = node
        self._pieces: asyncio.Queue[ExecChunk] = asyncio.Queue(maxsize=QUEUED_PIECES)
        self._closing: asyncio.Task[None] | None = None
        self._reader = asyncio.create_task(self._read_output())

    def __repr__(self) -> str:
        state = "RUNNING" if self._process.returncode is None else "ENDED"
        return f"<LocalProgram {self._node} pid {self._process.pid} {state}>"

    @classmethod
    async def start(cls, argv: Sequence[str], node: str) -> LocalProgram:
        """Starts the program. Raises OSError or ValueError (a NUL in an argument)."""
        start_task = asyncio.create_task(
            asyncio.create_subprocess_exec(
                *argv,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env=environment.child_environment(),
                start_new_session=True,
            )
        )
        try:
            process = await asyncio.shield(start_task)
        except asyncio.CancelledError:  # as in local_command.py: the start goes on, so its end is awaited
            with contextlib.suppress(OSError, ValueError):
                await cls(await start_task, node).close()
            raise
        return cls(process, node)

    async def write(self, data: bytes) -> None:
        assert self._process.stdin is not None, "it was started with a pipe"
        if self._process.stdin.is_closing():
            return
        with contextlib.suppress(ConnectionError):  # the program has ended, which ``read`` reports
            self._process.stdin.write(data)
            await self._process.stdin.drain()

    async def read(self) -> ExecChunk:
        chunk = None if self._closing is not None else await self._pieces.get()
        if chunk is None or self._closing is not None:  # ``close`` may have been called meanwhile
            raise ExecError(f"the command failed on {self._node}: it was closed", node=self._node)
        if chunk.ended:
            self._pieces.put_nowait(chunk)  # for later calls, which must also get the end
        return chunk

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._end())
        # A caller that is cancelled does not stop the end of the program, on which other callers may wait, too.
        await asyncio.shield(self._closing)

    async def _end(self) -> None:
        """Ends the program's input, and waits for the program's end. Then kills what is left of its group."""
        assert self._process.stdin is not None, "it was started with a pipe"
        self._process.stdin.close()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        with contextlib.suppress(asyncio.QueueFull):  # full: then no task waits in ``read``
            self._pieces.put_nowait(ExecChunk(OutputStream.STDOUT, b"", ended=True))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROGRAM_END_S):
                await wait_for_exit(self._process)  # reads its output, so that it does not wait for us
        await kill_group(self._process)

    async def _read_output(self) -> None:
        """Puts the program's output into the queue, and at its end the exit status."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read_pipe(OutputStream.STDOUT, self._process.stdout))
            group.create_task(self._read_pipe(OutputStream.STDERR, self._process.stderr))
        await self._process.wait()
        status = exit_status(self._process)
        await self._pieces.put(ExecChunk(OutputStream.STDOUT, b"", ended=True, exit_status=status))

    async def _read_pipe(self, stream: OutputStream, pipe: asyncio.StreamReader | None) -> None:
        assert pipe is not None, "it was started with a pipe"
        while data := await pipe.read(CHUNK_BYTES):
            await self._pieces.put(ExecChunk(stream, data))
