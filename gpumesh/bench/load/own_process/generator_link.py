"""``GeneratorProcess``: starts the load generator's own process, and lets it run stages."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Self

from gpumesh.bench.load.conditions import Via
from gpumesh.bench.load.generator import Disturbance, RunningStage, disturb_stage
from gpumesh.bench.load.http.raw_sender import Endpoint
from gpumesh.bench.load.own_process import generator_messages as messages
from gpumesh.bench.load.samples import LoadSample, StageRun
from gpumesh.bench.workload.stages import Stage
from gpumesh.config import environment
from gpumesh.errors import GPUMeshError

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 600.0  # for one request with its answer
STOP_TIMEOUT_S = 5.0  # for the report of a stage that is stopped
END_TIMEOUT_S = 2.0  # for the process to end after its input has ended


class GeneratorProcess:
    """The process of the load generator. It runs while the context is open: ``async with GeneratorProcess() as it``.

    Whatever ends this process ends the generator too, and so its requests.
    """

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    def __repr__(self) -> str:
        return f"<GeneratorProcess {'not started' if self._process is None else self._process.pid}>"

    @property
    def pid(self) -> int | None:
        """The process's pid; ``None`` before its start and after its end."""
        return None if self._process is None else self._process.pid

    async def __aenter__(self) -> Self:
        """Starts the process. Raises GPUMeshError if that fails."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "gpumesh.bench.load.own_process.generator_process",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,  # what goes wrong is a message
                env=environment.child_environment(),
                limit=messages.LINE_LIMIT,
                start_new_session=True,  # Ctrl-C at the terminal is for this process, which ends the generator
            )
        except OSError as error:
            raise GPUMeshError(f"cannot start the load generator: {error.strerror or error}") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends the process, and so its requests."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None, "the process was started with a pipe"
        process.stdin.close()
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            _kill(process)
            await process.wait()
        except BaseException:  # cancelled once more
            _kill(process)
            raise

    async def run_stage(
        self,
        stage: Stage,
        endpoints: Sequence[Endpoint],
        via: Via,
        *,
        on_record: Callable[[LoadSample], None] = lambda _: None,
        on_cut_short: Callable[[StageRun], None] = lambda _: None,
        disturbance: Disturbance | None = None,
        mesh_pid: int | None = None,
    ) -> StageRun:
        """Lets the process send the requests of a stage to ``endpoints``, and waits until they have ended.

        The records that ``on_record`` gets have no pieces and no counts: answers are parsed after the stage. The rest
        is as in ``generator.run_stage``. A cancelled stage ends the process, after it has reported what it has
        measured. Raises GPUMeshError when the process fails.
        """
        process = self._process
        assert process is not None, "the generator has not been started"
        run = RunningStage(stage, time.perf_counter, on_record)
        try:
            await self._send_stage(process, stage, endpoints, via, mesh_pid)
            async with _disturbed(run, disturbance):
                return await self._receive_stage(process, run)
        except BaseException:
            try:
                # A second Ctrl-C ends this wait.
                with contextlib.suppress(TimeoutError, GPUMeshError):
                    async with asyncio.timeout(STOP_TIMEOUT_S):
                        await self._send(process, messages.StopStage())
                        on_cut_short(await self._receive_stage(process, run))
            finally:
                _kill(process)  # it may go on with the stage
            raise

    async def _receive_stage(self, process: asyncio.subprocess.Process, run: RunningStage) -> StageRun:
        """Reads the messages of a stage until it has ended, and returns its outcome. Raises GPUMeshError when the
        process fails."""
        while True:
            match await self._receive(process):
                case messages.StageBegan(start_s=start_s):
                    run.start = start_s
                case messages.RequestEnded(sample=sample):
                    run.add(sample)
                case messages.Samples(samples=samples):
                    run.decoded.extend(samples)
                case messages.StageEnded() as ended:
                    run.records = run.decoded
                    return run.complete(ended.duration_s, ended.client, ended.conditions)

    async def _send_stage(
        self,
        process: asyncio.subprocess.Process,
        stage: Stage,
        endpoints: Sequence[Endpoint],
        via: Via,
        mesh_pid: int | None,
    ) -> None:
        """Sends the stage and its requests, and lets it begin."""
        opened = messages.OpenStage(
            stage.name,
            stage.concurrency,
            stage.duration_s,
            stage.think_s,
            tuple(endpoints),
            via,
            REQUEST_TIMEOUT_S,
            mesh_pid,
            stage.disturb,
        )
        await self._send(process, opened)
        for planned in stage.requests:
            request = messages.AddRequest(planned.chat, planned.node, planned.at_s, planned.conversation)
            await self._send(process, request)
        await self._send(process, messages.BeginStage())

    async def _send(self, process: asyncio.subprocess.Process, message: messages.ToGenerator) -> None:
        """Writes a message. If the process has ended, that is noticed when its messages are read."""
        assert process.stdin is not None, "the process was started with a pipe"
        with contextlib.suppress(ConnectionError):
            process.stdin.write(messages.encode(message))
            await process.stdin.drain()

    async def _receive(self, process: asyncio.subprocess.Process) -> messages.FromGenerator:
        """The next message of the process. Raises GPUMeshError when the process fails."""
        assert process.stdout is not None, "the process was started with a pipe"
        line = await process.stdout.readline()
        if not line:
            raise GPUMeshError("the load generator has ended unexpectedly")
        message = messages.decode_from_generator(line)
        if isinstance(message, messages.GeneratorFailed):
            log.error("the load generator failed: %s", message.traceback)
            raise GPUMeshError(f"the load generator failed: {message.message}")
        return message


def _kill(process: asyncio.subprocess.Process) -> None:
    """Ends the process at once."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()


@asynccontextmanager
async def _disturbed(run: RunningStage, disturbance: Disturbance | None) -> AsyncIterator[None]:
    """Lets the disturbance act in a stage that is to be disturbed, while the context is open."""
    if disturbance is None or not run.stage.disturb:
        yield
        return
    async with asyncio.TaskGroup() as group:
        task = group.create_task(disturb_stage(run, disturbance))
        try:
            yield
        finally:
            task.cancel()
