"""The load generator, ``python -m gpumesh.bench.load.own_process.generator_process``: a benchmark starts it.

It reads stages from its standard input and writes samples to its standard output (``generator_messages``). It ends when
its input ends, or when the process that started it does; its requests end with it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
import traceback

import msgspec

from gpumesh.bench.load.conversations import ConversationHistories
from gpumesh.bench.load.http.raw_answers import RawAnswer, decode_answer, read_answer_text, undecoded_sample
from gpumesh.bench.load.http.raw_sender import RawSender, ReadyRequest
from gpumesh.bench.load.limits.load_meter import LoadMeter
from gpumesh.bench.load.limits.measured_conditions import measured_conditions
from gpumesh.bench.load.loops import send_all
from gpumesh.bench.load.own_process import generator_messages as messages
from gpumesh.bench.load.samples import LoadSample
from gpumesh.event_loop.fast_loop import fast_loop_factory
from gpumesh.mesh.requests.connections.connection_pool import ConnectionPool
from gpumesh.tunnels.local_system import child_process

# So many bytes of answers are held until the stage has ended. With more, each answer is parsed when it has ended.
MAX_HELD_BYTES = 256 << 20


class StageInProcess:
    """One stage: its requests are added first, then it runs."""

    def __init__(self, opened: messages.OpenStage, pool: ConnectionPool, writer: asyncio.StreamWriter) -> None:
        self._opened = opened
        self._writer = writer
        self._sender = RawSender(pool, opened.endpoints, timeout_s=opened.timeout_s)
        self._requests: list[ReadyRequest] = []
        self._conversations: list[int | None] = []  # the id of each request's conversation
        self._turns: dict[int, messages.AddRequest] = {}  # the requests of conversations, by their number
        self._histories = ConversationHistories()
        self._meter = LoadMeter(opened.mesh_pid)
        self._held: list[RawAnswer] = []  # answers that are not decoded yet
        self._held_bytes = 0
        self._samples: list[LoadSample] = []  # of answers that were parsed while the stage ran
        self._start_s = 0.0  # when the stage began, on the clock
        self._is_stopped = False  # no request may be sent any more

    def __repr__(self) -> str:
        return f"<StageInProcess {self._opened.name} {len(self._requests)} requests, {len(self._held)} answers held>"

    def add(self, request: messages.AddRequest) -> None:
        """Adds a request, and makes it ready to be sent."""
        if request.conversation is not None:
            self._turns[len(self._requests)] = request
        self._conversations.append(request.conversation)
        self._requests.append(self._sender.prepare(request.chat, request.node, request.at_s))

    async def run(self) -> None:
        """Sends all requests, waits for their answers, and writes the samples: also if the stage is stopped."""
        gc.collect()
        gc.disable()  # a collection would delay all streams for some milliseconds
        try:
            await self._send_all()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_stopped or task is None:
                raise
            task.uncancel()
        finally:
            gc.enable()
        await self._report()

    def stop(self, running: asyncio.Task[None]) -> None:
        """Ends the stage before its end. ``running`` is the task of ``run``."""
        self._is_stopped = True
        running.cancel()

    async def _send_all(self) -> None:
        """Sends all requests, and waits for their answers."""
        opened = self._opened
        async with self._meter.measure():
            self._start_s = self._meter.started_s
            self._write(messages.StageBegan(self._start_s))
            await send_all(
                self._send_one,
                self._conversations,
                [request.at_s for request in self._requests],
                opened.concurrency,
                until_s=opened.duration_s,
                now=self._now,
                think_s=opened.think_s,
            )

    def _now(self) -> float:
        """The time since the start of the stage, in seconds."""
        return time.perf_counter() - self._start_s

    async def _send_one(self, index: int) -> None:
        """Sends a request, and keeps its answer."""
        request, turn = self._requests[index], self._turns.get(index)
        if turn is not None:  # what was said before is known only now
            turn = msgspec.structs.replace(turn, chat=self._histories.continue_chat(turn.conversation, turn.chat))
            request = self._sender.prepare(turn.chat, turn.node, turn.at_s)
        intended_s = None if request.at_s is None else self._start_s + request.at_s
        answer = await self._sender.send(request, index, intended_s)
        if turn is not None:
            self._histories.add_answer(turn.conversation, turn.chat, read_answer_text(answer))
        self._write(messages.RequestEnded(undecoded_sample(answer, self._opened.name, self._start_s)))
        if self._held_bytes + answer.size > MAX_HELD_BYTES:
            self._samples.append(self._decode(answer))
        else:
            self._held_bytes += answer.size
            self._held.append(answer)

    def _decode(self, answer: RawAnswer, *, is_unfinished: bool = False) -> LoadSample:
        """Makes the sample of an answer, as ``decode_answer``."""
        name, keeps_text = self._opened.name, self._opened.keeps_texts
        return decode_answer(answer, name, self._start_s, is_unfinished=is_unfinished, keeps_text=keeps_text)

    async def _report(self) -> None:
        """Parses the answers, and writes the samples and the conditions of the stage."""
        parsed_early = len(self._samples)
        for answer in self._sender.in_flight.values():  # of a stage that was stopped
            answer.ended_s = self._meter.ended_s
            self._samples.append(self._decode(answer, is_unfinished=True))
        while self._held:
            self._samples.append(self._decode(self._held.pop()))
        samples = sorted(self._samples, key=lambda sample: sample.index)
        for first in range(0, len(samples), messages.SAMPLES_PER_MESSAGE):
            self._write(messages.Samples(tuple(samples[first : first + messages.SAMPLES_PER_MESSAGE])))
            await self._writer.drain()
        meter = self._meter
        client, conditions = measured_conditions(
            samples, meter, via=self._opened.via, own_process=True, parsed_early=parsed_early
        )
        self._write(messages.StageEnded(meter.duration_s, client, conditions))
        await self._writer.drain()

    def _write(self, message: messages.FromGenerator) -> None:
        self._writer.write(messages.encode(message))


async def serve() -> None:
    """Runs the stages that come, one after another, until the input ends. A stage that still runs then is given up."""
    reader, writer = await _open_pipes()
    pool = ConnectionPool(asyncio.get_running_loop())
    stage: StageInProcess | None = None  # the latest one
    try:
        async with asyncio.TaskGroup() as group:
            running: asyncio.Task[None] | None = None
            while line := await reader.readline():
                message = messages.decode_to_generator(line)
                if isinstance(message, messages.OpenStage):
                    stage = StageInProcess(message, pool, writer)
                elif stage is None:
                    raise ValueError("a request came before its stage")
                elif isinstance(message, messages.AddRequest):
                    stage.add(message)
                elif isinstance(message, messages.BeginStage):
                    running = group.create_task(stage.run())
                elif running is not None:
                    stage.stop(running)
            if running is not None:
                running.cancel()
    except Exception as error:  # a bug of ours: the benchmark reports it, because nobody sees our standard error
        failure = messages.GeneratorFailed(f"{type(error).__name__}: {error}", traceback.format_exc())
        writer.write(messages.encode(failure))
        await writer.drain()
        raise
    finally:
        pool.close()


async def _open_pipes() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Standard input and standard output, for asyncio."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=messages.LINE_LIMIT)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout)
    return reader, asyncio.StreamWriter(transport, protocol, None, loop)


def main() -> None:
    """Runs the process. Ctrl-C at a terminal reaches it too, and is left to the benchmark that has started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child_process.die_with_parent(os.getppid())
    child_process.set_title("gpumesh load generator")
    with asyncio.Runner(loop_factory=fast_loop_factory()) as runner:
        runner.run(serve())


if __name__ == "__main__":
    main()
