"""One answer out of several upstream streams: a cut stream is continued, a few times at most, or ended with an error.

Pure, no I/O.

How a proxy drives it::

    answer = Continuation(path, request_body, clock=time.monotonic, strategies=strategies)
    upstream = send(original call)
    while True:
        for data in upstream:                            # until it ends, breaks, or stays silent for too long
            client.write(answer.feed(data))
            if answer.finished or answer.cut_reason: break
        else: client.write(answer.finish_body())         # only where the body ended as HTTP says
        if answer.finished: break
        abort upstream
        if (ending := answer.handle_cut(reason)) is None:
            choose another node
            if (question := answer.render_call(node, kind)):   # at most one short question, to the chosen node
                answer.apply_rendered_prompt(node, *ask(question))   # status and body; left out if it failed
            ending = answer.next_call(node, kind)
        if isinstance(ending, Ending): break             # ending.data completes it, or ending.error says why not
        upstream = send(ending)                          # if it fails before `feed` gave anything: the next node

Only whole frames are passed on. So a cut never leaves half a line with the client, and what was passed on is exactly
what the next node is asked to continue: nothing is lost, nothing repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gpumesh.backends.base import JSON_HEADERS, HttpCall, ServerCounters
from gpumesh.backends.continuation.planner import ContinuationPlanner, ContinuationStrategies
from gpumesh.backends.continuation.received_text import UNREAD_BYTES, ReceivedText, split_frames
from gpumesh.backends.continuation.stream_format import Frame, PartialAnswer, StreamFormat
from gpumesh.backends.continuation.stream_formats import stream_format_for
from gpumesh.backends.dialects import find_counters
from gpumesh.backends.frames import LINE_LIMIT, FrameAssembler
from gpumesh.topology import BackendKind

MAX_CUTS = 3


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of an answer that no node goes on with: ``data`` completes it, unless ``error`` says why it is
    incomplete."""

    data: bytes = b""
    error: str | None = None


class Continuation:
    """``finished``: the client has the whole answer. ``cut_reason``: why the current upstream must not be read further
    (an error frame, or no frame at all), while the client's answer is not finished. ``frame_separator`` ends a frame of
    the current upstream: there are about as many tokens as separators. ``counters`` are the upstream's own figures,
    once it gave them, and ``answer_counters`` those of the whole answer.

    ``resume`` is false for ``X-GPUMesh-Resume: off``. ``clock`` gives seconds, and ``started_at`` is when the request
    came, if that was before now. ``reserve_bytes``: see ``ContinuationPlanner``.

    A little longer than other classes: a third of it hands questions on to the planner and to the text that was
    received, so that a proxy deals with one object.
    """

    def __init__(
        self,
        path: str,
        request: bytes,
        *,
        clock: Callable[[], float],
        strategies: ContinuationStrategies | None = None,
        resume: bool = True,
        started_at: float | None = None,
        reserve_bytes: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._path = path
        self._request_body = request
        self._form: StreamFormat = stream_format_for(path)
        self._clock = clock
        self._resume = resume
        self._started_at = clock() if started_at is None else started_at
        strategies = {} if strategies is None else strategies
        self._planner = ContinuationPlanner(path, request, self._form, strategies, reserve_bytes)
        self._received = ReceivedText(self._form, keeps=resume and self._form.supports_continuation)
        self._unread = self._received.unread
        # The first upstream has sent text, which is kept: so text is passed on as it comes, until a frame ends the text
        # or the stream is cut.
        self._passes_text = False
        self._frames = 0  # that were sent since they were taken, but for those in ``_unread`` past ``_counted_bytes``
        self._counted_bytes = 0
        self._read_with(self._form)
        # Of the current upstream: when its first and its last whole frames came.
        self._first_at: float | None = None
        self._last_at = 0.0
        self._spent_ms = 0.0  # by the upstreams before
        self._partial_answer = PartialAnswer()
        self._cut_message = ""
        self.cuts = 0
        self.finished = False
        self.cut_reason: str | None = None
        self.counters: ServerCounters | None = None
        self.answer_counters: ServerCounters | None = None

    def __repr__(self) -> str:
        state = "finished" if self.finished else f"cut: {self.cut_reason}" if self.cut_reason else "under way"
        return f"<Continuation {self._path} {state}, {self.cuts} cuts before>"

    @property
    def tokens(self) -> int:
        """Frames with text that the client has received: about as many tokens."""
        self._read_unread()
        return self._received.tokens

    @property
    def text(self) -> str:
        """The answer's text that the client has received."""
        self._read_unread()
        return "".join(self._received.texts)

    @property
    def continuable(self) -> bool:
        """Whether another node could go on, if this upstream were cut now."""
        self._read_unread()
        return self.cuts < MAX_CUTS and self._refusal() is None

    def error_frame(self, message: str) -> bytes:
        """An explicit error in the client's dialect, as a frame of the stream."""
        return self._form.error_frame(message)

    # -- upstream to client --------------------------------------------------------------------------------------

    def feed(self, data: bytes, now: float | None = None) -> bytes:
        """What the client gets for these bytes of the current upstream; empty after its end or a cut. ``now`` is the
        clock's time, for a caller that knows it. Each streamed token passes here."""
        now = self._clock() if now is None else now
        if (
            self._passes_text
            and not self._held
            and data.endswith(self.frame_separator)
            and self._find_marks(data) is None
        ):
            self._last_at = now
            unread = self._unread
            unread += data
            if len(unread) > UNREAD_BYTES:
                self._read_unread()
            return data
        return self._feed_frames(data, now)

    def _feed_frames(self, data: bytes, now: float) -> bytes:
        """All but the most common case."""
        if self.finished or self.cut_reason is not None:
            return b""
        if self._held or not data.endswith(self.frame_separator):
            data = self._assemble(data)
            if not data:
                return b""
        self._note_time(now)
        if self.cuts or self._find_marks(data) is not None:
            self._frames += data.count(self.frame_separator)
            return self._pass_on_frames(data)
        # Text as the client shall have it. It is read only if it is ever needed.
        received = self._received
        received.started = True
        if received.keeps:
            received.unread += data
            self._passes_text = True
        else:
            self._frames += data.count(self.frame_separator)
        return data

    def take_frame_count(self) -> int:
        """How many frames the upstreams sent since the last call: about as many tokens."""
        count = self._frames + self._unread.count(self.frame_separator, self._counted_bytes)
        self._frames, self._counted_bytes = 0, len(self._unread)
        return count

    def finish_body(self) -> bytes:
        """The upstream's body ended as HTTP says: its last frame may lack its end mark. Half a frame is a cut."""
        raw = self._assembler.take_rest() + self.frame_separator
        if self.finished or self.cut_reason is not None:
            return b""
        frame = self._source.read(raw)
        self.cut_reason = frame.error
        self._passes_text = False
        if frame.error is not None or (frame.document is None and not frame.ends_stream):
            return b""
        self._note_time(self._clock())
        return self._pass_on_frames(raw)

    def abandon_upstream(self) -> None:
        """The current upstream failed before it gave anything: another one takes its place."""
        self._passes_text = False
        self._assembler.take_rest()
        self.cut_reason = None
        self.counters = None
        self._first_at = None
        self._frames = 0

    def _read_with(self, form: StreamFormat) -> None:
        """The current upstream's stream has this form."""
        self._source = form
        self._find_marks = form.find_marks
        self._assembler = FrameAssembler(form.find_last_frame_end)
        self._held = self._assembler.held
        self.frame_separator = form.frame_separator

    def _assemble(self, data: bytes) -> bytes:
        whole = self._assembler.feed(data)
        if self._assembler.is_too_long:
            self._assembler.take_rest()
            self._passes_text = False
            self.cut_reason = f"a frame of more than {LINE_LIMIT >> 20} MiB"
        return whole

    def _note_time(self, now: float) -> None:
        self._last_at = now
        if self._first_at is None:
            self._first_at = now

    def _read_unread(self) -> None:
        self._frames = self.take_frame_count()
        self._counted_bytes = 0
        self._received.read_unread()
        self._passes_text = self._passes_text and self._received.keeps

    def _pass_on_frames(self, frames: bytes) -> bytes:
        self._read_unread()
        passed_on = b"".join([self._pass_on(raw) for raw in split_frames(self._source, frames)])
        if self.finished or self.cut_reason is not None:
            self._passes_text = False
        return passed_on

    def _pass_on(self, raw: bytes) -> bytes:
        """One frame that is read."""
        if self.finished or self.cut_reason is not None:
            return b""
        frame = self._source.read(raw)
        if frame.error is not None:
            self.cut_reason = frame.error
            return b""
        if frame.ends_stream and not self._ends_with_reason(frame):
            self.cut_reason = "the stream ended without a reason to"
            return b""
        counters = find_counters(raw) if frame.ends_stream or b'"usage":{' in raw or b'"timings"' in raw else None
        self.counters = counters or self.counters
        if self.cuts:
            elapsed_ms = (self._clock() - self._started_at) * 1000.0
            # The client gets the figures of the whole answer; the frame holds those of the last attempt only.
            raw = self._source.translate(frame, replace(self._partial_answer, elapsed_ms=elapsed_ms))
            counters = None if counters is None else find_counters(raw)
        self.answer_counters = counters or self.answer_counters
        self._received.add_frame(frame)
        self.finished = frame.ends_stream
        return raw

    def _ends_with_reason(self, frame: Frame) -> bool:
        """OpenAI's ``[DONE]`` may follow a failure, too: then no reason to finish came before it."""
        return frame.document is not None or not self._form.supports_continuation or self._received.is_complete

    # -- a cut ---------------------------------------------------------------------------------------------------

    def handle_cut(self, reason: str | None = None) -> Ending | None:
        """The current upstream is over, and ``finished`` is false. ``None``: another node may go on."""
        assert not self.finished, "the client has the whole answer"
        self._cut_message = reason or self.cut_reason or "the stream ended before its final frame"
        self._read_unread()
        received = self._received
        if self._first_at is not None:
            self._spent_ms += (self._last_at - self._first_at) * 1000.0
        self.abandon_upstream()
        self.cuts += 1
        self._partial_answer = PartialAnswer(
            text="".join(received.texts),
            thinking="".join(received.thinking_texts),
            tokens=received.tokens,
            spent_ms=self._spent_ms,
            elapsed_ms=(self._clock() - self._started_at) * 1000.0,
            cuts=self.cuts,
            first_frame=received.first_frame,
        )
        if received.is_complete:  # only what stands after the text is missing
            return self._complete(self._form.closing_frames("", self._partial_answer))
        refusal = self._refusal()
        if refusal is not None:
            return self._refuse(refusal)
        budget = self._planner.token_budget if received.tokens else None
        if budget is not None and received.tokens >= budget:
            return self._complete(self._form.closing_frames("length", self._partial_answer))
        return None

    def render_call(self, node: str, kind: BackendKind) -> HttpCall | None:
        """What to ask of the node that will go on; ``None`` when nothing need be asked."""
        return self._planner.render_call(node, kind, self._partial_answer)

    def apply_rendered_prompt(self, node: str, status: int, body: bytes) -> None:
        """The answer to ``render_call``."""
        self._planner.apply_rendered_prompt(node, status, body)

    def next_call(self, node: str, kind: BackendKind) -> HttpCall | Ending | None:
        """What to send to the node that will go on. ``None``: this node did not say how; another may."""
        self._read_with(self._form)
        if not self._partial_answer.text and not self._partial_answer.thinking:
            return HttpCall("POST", self._path, self._request_body, JSON_HEADERS)
        step = self._planner.next_call(node, kind, self._partial_answer)
        if isinstance(step, str):
            return self._refuse(step)
        if step is None:
            return None
        self._read_with(step.form)
        return step.call

    def _refusal(self) -> str | None:
        """Why no other node can go on; ``None`` where one can."""
        if not self._resume:
            return "the client asked for no continuation"
        if self.cuts > MAX_CUTS:
            return f"it was cut more than {MAX_CUTS} times"
        return self._planner.refusal(self._received)

    def _complete(self, data: bytes) -> Ending:
        self.finished = True
        return Ending(data)

    def _refuse(self, refusal: str) -> Ending:
        self.finished = True
        return Ending(error=f"the answer was cut ({self._cut_message}) and could not be continued: {refusal}")
