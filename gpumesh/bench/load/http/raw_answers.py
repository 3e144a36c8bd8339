"""Answers as they arrived: their bytes with the time of each read. They are parsed when the stage has ended.

While a stage runs, the load generator only notes bytes and times. So what it costs does not depend on the API, and no
answer waits until another one is parsed.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from gpumesh.bench.load.answer_reading import AnswerReading
from gpumesh.bench.load.http.client_apis import API_FUNCTIONS, ClientApi
from gpumesh.bench.load.samples import LoadSample
from gpumesh.errors import GPUMeshError, StreamCut

MAX_ANSWER_BYTES = 64 << 20  # a longer answer is given up: a server that never ends must not fill the memory


class ArrivalSink:
    """Keeps the bytes of one answer, with the time of each read. Implements ``mesh.requests.body_sink.BodySink``.

    ``data`` has all bytes. ``times_s`` has the time of each read, on ``time.perf_counter``, and ``ends`` the length of
    ``data`` after it. ``ended_s`` is the time of the end. ``problem`` says why the answer ended before it was complete.
    """

    __slots__ = ("backpressured", "data", "end", "ended_s", "ends", "on_writable", "problem", "times_s")

    inspects_frames = False

    def __init__(self, end: asyncio.Future[None]) -> None:
        """``end`` is completed at the end of the answer."""
        self.on_writable: Callable[[], None] | None = None
        self.backpressured = False
        self.data = bytearray()
        self.times_s = array("d")
        self.ends = array("Q")
        self.ended_s: float | None = None
        self.problem: str | None = None
        self.end = end

    def __repr__(self) -> str:
        return f"<ArrivalSink {len(self.data)} bytes in {len(self.times_s)} reads>"

    def write(self, data: bytes) -> None:
        """Keeps the bytes of one read. Each streamed token passes here."""
        self.times_s.append(time.perf_counter())
        self.data += data
        self.ends.append(len(self.data))
        if len(self.data) > MAX_ANSWER_BYTES:
            self.backpressured = True  # the source reads no more; the sender closes the connection
            self.fail(f"it is longer than {MAX_ANSWER_BYTES >> 20} MiB")

    def finish(self) -> None:
        """Notes the end of a complete answer."""
        self._note_end()

    def fail(self, problem: str) -> None:
        """Notes the end of an answer that is not complete."""
        if self.ended_s is None:
            self.problem = problem
        self._note_end()

    def _note_end(self) -> None:
        if self.ended_s is None:
            self.ended_s = time.perf_counter()
        if not self.end.done():
            self.end.set_result(None)


@dataclass(slots=True)
class RawAnswer:
    """One request and what came of it. Times are seconds on ``time.perf_counter``.

    ``sink`` is ``None`` if no answer began with status 200; then ``error`` says why. ``api`` is the API of the answer.
    ``attempts`` is 0 if nobody says.
    """

    index: int
    intended_s: float
    sent_s: float
    api: ClientApi
    node: str | None = None
    attempts: int = 0
    ended_s: float = 0.0
    sink: ArrivalSink | None = None
    error: GPUMeshError | None = None

    @property
    def size(self) -> int:
        """The bytes of memory that the answer takes, about: 8 for a time and 8 for a length, beside its text."""
        return 0 if self.sink is None else len(self.sink.data) + 16 * len(self.sink.times_s)


def decode_answer(
    answer: RawAnswer, stage: str, start_s: float, *, is_unfinished: bool = False, keeps_text: bool = False
) -> LoadSample:
    """Makes the sample of an answer. ``start_s`` is the start of the stage, on the clock of the answer. ``keeps_text``:
    with the answer's text.

    A piece arrived when the read came that completed its frame. ``is_unfinished``: the stage was stopped before the
    answer ended.
    """
    reading, sink, reader = AnswerReading(keeps_text), answer.sink, API_FUNCTIONS[answer.api].create_reader()
    error, ended_s = answer.error, answer.ended_s
    time_s = ended_s
    try:
        if sink is not None:
            begin = 0
            for time_s, end in zip(sink.times_s, sink.ends, strict=True):
                for chunk in reader.feed(bytes(memoryview(sink.data)[begin:end])):
                    reading.add(chunk, time_s)
                begin = end
            time_s = ended_s
            if is_unfinished:
                pass  # the end is missing, and that is nobody's fault
            elif sink.problem is not None:
                raise StreamCut(f"the answer stopped short: {sink.problem}", node=answer.node)
            else:
                for chunk in reader.close():
                    reading.add(chunk, time_s)
    except GPUMeshError as raised:
        error, ended_s = error or raised, time_s
    return reading.make_sample(
        stage=stage,
        index=answer.index,
        start_s=start_s,
        intended_s=answer.intended_s,
        sent_s=answer.sent_s,
        ended_s=ended_s,
        node=answer.node,
        attempts=answer.attempts if error is None else 0,
        error=error,
        is_unfinished=is_unfinished,
    )


def read_answer_text(answer: RawAnswer) -> str:
    """The text of an answer; empty for an answer that failed or was cut."""
    if answer.sink is None or answer.error is not None or answer.sink.problem is not None:
        return ""
    reader = API_FUNCTIONS[answer.api].create_reader()
    try:
        chunks = [*reader.feed(bytes(answer.sink.data)), *reader.close()]
    except GPUMeshError:
        return ""
    return "".join(chunk.text for chunk in chunks)


def undecoded_sample(answer: RawAnswer, stage: str, start_s: float) -> LoadSample:
    """The sample of an answer that is not parsed yet, for a person who waits: it has no pieces and no counts."""
    return AnswerReading().make_sample(
        stage=stage,
        index=answer.index,
        start_s=start_s,
        intended_s=answer.intended_s,
        sent_s=answer.sent_s,
        ended_s=answer.ended_s,
        node=answer.node,
        attempts=answer.attempts,
        error=answer.error,
    )
