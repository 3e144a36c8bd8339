"""``Continuation`` makes one answer of several upstream streams: a cut stream is continued, or ends with an error.

Pure. How a proxy drives it::

    answer = Continuation(path, request_body, clock=time.monotonic, strategies=strategies)
    upstream = send(original call)
    while True:
        for data in upstream:                            # until it ends, breaks, or stays silent for too long
            client.write(answer.feed(data))
            if answer.finished or answer.cut_reason: break
        else: client.write(answer.finish_body())         # only where the body ended as HTTP says
        if answer.finished: break
        abort upstream
        for _ in answer.prepare_cut(): let others run    # the request may be long
        if (ending := answer.handle_cut(reason)) is None:
            choose another node
            while (question := answer.next_question(node, kind)):   # short questions to the chosen node
                answer.apply_reply(*ask(question))           # status and body; status 0 if no answer came in time
            ending = answer.next_call(node, kind)
        if isinstance(ending, Ending): break             # ending.data completes it, or ending.error says why not
        upstream = send(ending)                          # if it fails before `feed` gave anything: the next node

Only whole frames are passed on, and the next node is asked to continue exactly these: no text is lost or repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from gpumesh.backends.base import JSON_HEADERS, HttpCall, ServerCounters
from gpumesh.backends.continuation.ending import Ending
from gpumesh.backends.continuation.planner import ContinuationPlanner, ContinuationStrategies
from gpumesh.backends.continuation.prefill import RepeatedText
from gpumesh.backends.continuation.received_text import UNREAD_BYTES, ReceivedText, split_frames
from gpumesh.backends.continuation.stream_format import Frame, PartialAnswer, StreamFormat
from gpumesh.backends.continuation.stream_formats import stream_format_for
from gpumesh.backends.dialects import find_counters
from gpumesh.backends.frames import LINE_LIMIT, FrameAssembler
from gpumesh.topology import BackendKind

MAX_CUTS = 3  # an answer that is cut more often is not continued
HELD_BYTES = 64 << 10  # the most bytes of frames without content that are held until the first token comes


class Continuation:
    """One answer: the client's stream, made of the streams of the upstreams that serve it one after the other.

    ``finished``: the client has the whole answer, or the answer ended with an error. ``cut_reason``: why the current
    upstream must not be read further, although the answer is not finished (an error frame, or bytes that are not a
    frame). ``exceeds_bound``: the reason is a bound of ours, the longest frame. ``frame_separator`` ends a frame of the
    current upstream; there are about as many tokens as separators. ``progress_at``: the clock's time of the last bytes
    that were more than a comment and had to be read. ``counters`` are the figures that the current upstream gave,
    ``answer_counters`` those of the whole answer.

    ``resume`` is false for ``X-GPUMesh-Resume: off``. ``clock`` returns seconds. ``started_at`` is the time of the
    request, if that came before now. ``reserve_bytes``: see ``ContinuationPlanner``. A long class: a third of it calls
    the planner and the received text.
    """

    # fmt: off
    __slots__ = (
        "_assembler", "_awaits_token", "_client_format", "_clock", "_counted_bytes", "_cut_message", "_find_marks",
        "_first_frame_at", "_frame_count", "_held_frames", "_hidden_tokens", "_incomplete_frame", "_last_frame_at",
        "_partial_answer", "_passes_text", "_path", "_planner", "_received", "_repeated_text", "_request_body",
        "_resume", "_spent_ms", "_started_at", "_unread", "_upstream_format", "answer_counters", "counters",
        "cut_reason", "cuts", "exceeds_bound", "finished", "frame_separator", "progress_at",
    )
    # fmt: on

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
        self._client_format: StreamFormat = stream_format_for(path)
        self._clock = clock
        self._resume = resume
        self._started_at = clock() if started_at is None else started_at
        strategies = {} if strategies is None else strategies
        self._planner = ContinuationPlanner(path, request, self._client_format, strategies, reserve_bytes)
        self._received = ReceivedText(self._client_format, keeps=resume and self._client_format.supports_continuation)
        self._unread = self._received.unread
        # Whether frames of text are passed on unread: the first upstream has sent text, the text is kept, no frame is
        # incomplete, and neither the end of the stream nor a cut has come.
        self._passes_text = False
        # The number of frames since the last ``take_frame_count``. It does not include the frames in ``_unread`` after
        # its first ``_counted_bytes`` bytes: these are counted later.
        self._frame_count = 0
        self._counted_bytes = 0
        self._use_upstream_format(self._client_format)
        # Until the first token of the current upstream, its frames are held: another can still take its place.
        self._awaits_token = True
        self._held_frames = bytearray()
        self._repeated_text = RepeatedText("")
        self.progress_at = 0.0
        # The times of the current upstream's first and last whole frames.
        self._first_frame_at: float | None = None
        self._last_frame_at = 0.0
        self._hidden_tokens = 0  # counted by servers beyond the frames: some send several tokens in a frame
        self._spent_ms = 0.0  # the time that earlier upstreams took, from their first frame to their last
        self._partial_answer = PartialAnswer()
        self._cut_message = ""
        self.cuts = 0  # how often the answer was cut before
        self.finished = self.exceeds_bound = False
        self.cut_reason: str | None = None
        self.counters: ServerCounters | None = None
        self.answer_counters: ServerCounters | None = None

    def __repr__(self) -> str:
        state = f"cut: {self.cut_reason}" if self.cut_reason else "under way"
        if self.finished:
            state = "finished"
        return f"<Continuation {self._path} {state}, {self.cuts} cuts before>"

    @property
    def tokens(self) -> int:
        """The number of frames with text that the client has received: about as many tokens."""
        self._read_unread()
        return self._received.tokens

    @property
    def text(self) -> str:
        """The answer's text that the client has received."""
        self._read_unread()
        return "".join(self._received.texts)

    @property
    def upstream_text_bytes(self) -> int | None:
        """The bytes of text and thinking that the current upstream has sent; ``None``: they were not counted."""
        self._read_unread()
        return self._received.upstream_text_bytes

    @property
    def continuable(self) -> bool:
        """Whether another node could continue the answer, if this upstream were cut now."""
        self._read_unread()
        return self.cuts < MAX_CUTS and self._refusal() is None

    def error_frame(self, message: str) -> bytes:
        """An explicit error in the client's dialect, as a frame of the stream."""
        return self._client_format.error_frame(message)

    # -- upstream to client --------------------------------------------------------------------------------------

    def feed(self, data: bytes, now: float | None = None) -> bytes:
        """Takes bytes of the current upstream, and returns the bytes for the client: ``data`` itself if it holds only
        text; nothing after the end or a cut. ``now`` is the clock's time, if the caller knows it already. Each streamed
        token passes here."""
        now = self._clock() if now is None else now
        if self._passes_text and data.endswith(self.frame_separator) and self._find_marks(data) is None:
            self._last_frame_at = now
            unread = self._unread
            unread += data
            if len(unread) > UNREAD_BYTES:
                self._read_unread()
            return data
        return self._feed_frames(data, now)

    def _feed_frames(self, data: bytes, now: float) -> bytes:
        """Does the work of ``feed`` in all cases but the most common one."""
        if self.finished or self.cut_reason is not None:
            return b""
        if self._incomplete_frame or not data.endswith(self.frame_separator):
            data = self._assemble(data)
            if not data:
                self.progress_at = now
                return b""
        if self._awaits_token or self.cuts or self._find_marks(data) is not None:
            return self._pass_on_frames(data, now)
        self._record_time(now)
        # These frames hold text only, so they are passed on as they are. They are read later, if ever.
        received = self._received
        if received.keeps:
            received.unread += data
            self._passes_text = not self._incomplete_frame
        else:
            self._frame_count += data.count(self.frame_separator)
        return data

    def take_frame_count(self) -> int:
        """Returns the number of frames that the upstreams have sent since the last call: about as many tokens."""
        count = self._frame_count + self._unread.count(self.frame_separator, self._counted_bytes)
        self._frame_count, self._counted_bytes = 0, len(self._unread)
        return count

    def finish_body(self) -> bytes:
        """Handles the end of the upstream's body, if it ended as HTTP requires. Returns the last bytes for the client.
        The separator after the last frame may be missing. If a part of the frame itself is missing, the stream was
        cut."""
        raw = self._assembler.take_rest() + self.frame_separator  # the last frame, if anything is left
        if self.finished or self.cut_reason is not None:
            return b""
        frame = self._upstream_format.read(raw)
        self.cut_reason = frame.error
        self._passes_text = False
        is_last_frame = frame.error is None and not frame.is_empty
        return self._pass_on_frames(raw, self._clock()) if is_last_frame else b""

    def abandon_upstream(self) -> None:
        """Forgets the state of the current upstream, so that another upstream can take its place."""
        self._passes_text = False
        self._assembler.take_rest()
        self._awaits_token = True
        self._held_frames.clear()
        self._repeated_text = RepeatedText("")
        self.cut_reason = None
        self.exceeds_bound = False
        self.counters = None
        self._first_frame_at = None
        self._frame_count = 0
        self._received.begin_upstream()

    def _use_upstream_format(self, stream_format: StreamFormat) -> None:
        """Reads the upstream's stream in this format from now on."""
        self._upstream_format = stream_format
        self._find_marks = stream_format.find_marks
        self._assembler = FrameAssembler(stream_format.find_last_frame_end)
        self._incomplete_frame = self._assembler.held
        self.frame_separator = stream_format.frame_separator

    def _assemble(self, data: bytes) -> bytes:
        """Adds the data to the incomplete frame. Returns the frames that are whole now. A frame that is too long is a
        cut."""
        self._passes_text = False  # until no frame is incomplete
        whole_frames = self._assembler.feed(data)
        if self._assembler.is_too_long:
            self._assembler.take_rest()
            self.cut_reason = f"a frame of more than {LINE_LIMIT >> 20} MiB, which is not passed on"
            self.exceeds_bound = True
        return whole_frames

    def _record_time(self, now: float) -> None:
        """Notes the time of the current upstream's first token and of its last whole frame."""
        self._last_frame_at = self.progress_at = now
        if self._first_frame_at is None:
            self._first_frame_at = now

    def _read_unread(self) -> None:
        """Counts and reads the frames that were passed on unread."""
        self._frame_count = self.take_frame_count()
        self._counted_bytes = 0
        self._received.read_unread()
        self._passes_text = self._passes_text and self._received.keeps

    def _pass_on_frames(self, frames: bytes, now: float) -> bytes:
        """Reads whole frames one by one, and returns the client's frames for them.

        Before the first token, they are held: a server may send comments, or the role of the answer, while it still
        loads the model or reads the prompt."""
        client_frames = self._held_frames
        for raw in split_frames(self._upstream_format, frames):
            client_frames += self._pass_on_frame(raw, now)
        if self.finished or self.cut_reason is not None:
            self._passes_text = False
        if self._awaits_token:
            if len(client_frames) > HELD_BYTES:
                self.cut_reason = f"more than {HELD_BYTES >> 10} KiB without a token"
            return b""
        self._held_frames = bytearray()
        return bytes(client_frames)  # never ``frames`` itself: by this, the caller knows that frames were read

    def _pass_on_frame(self, raw: bytes, now: float) -> bytes:
        """Reads one whole frame (``raw``), and returns the client's frame for it; empty for an error, for a comment
        before the first token, and after the end or a cut."""
        if self.finished or self.cut_reason is not None:
            return b""
        whole_frame = self._upstream_format.read(raw)
        if whole_frame.is_empty:
            return b"" if self._awaits_token or self.cuts else raw
        frame = self._repeated_text.remove(whole_frame)
        if frame is None:
            return b""
        self._frame_count += 1
        if frame.error is not None:
            self.cut_reason = frame.error
            return b""
        if frame.ends_stream and not self._ends_with_reason(frame):
            self.cut_reason = "the stream ended without a reason to"
            return b""
        if frame.has_content or frame.text_complete or frame.ends_stream:
            self._awaits_token = False
        if not self._awaits_token:
            self._record_time(now)
        has_usage = b'"usage"' in raw and b'"usage":null' not in raw
        may_have_counters = frame.ends_stream or has_usage or b'"timings"' in raw
        counters = find_counters(raw) if may_have_counters else None  # first those of this upstream
        if counters is not None:
            self.counters = counters.with_prompt_counts_of(self.counters)
        if self.cuts:
            elapsed_ms = (self._clock() - self._started_at) * 1000.0
            # The client gets the figures of the whole answer; this frame holds only the figures of the last attempt.
            raw = self._upstream_format.translate(frame, replace(self._partial_answer, elapsed_ms=elapsed_ms))
            counters = None if counters is None else find_counters(raw)  # now those of the whole answer
        if counters is not None:
            self.answer_counters = counters.with_prompt_counts_of(self.answer_counters)
        received = self._received
        if frame.text or frame.thinking or frame.has_other_content or received.first_frame is None:
            self._read_unread()  # the text of the unread frames comes before that of this frame
        received.add_frame(frame)
        self.finished = frame.ends_stream
        return raw

    def _ends_with_reason(self, frame: Frame) -> bool:
        """Whether the last frame ends a complete answer. OpenAI's ``[DONE]``, which holds no document, may also follow
        a failure: then a choice has come without a finish reason."""
        return frame.document is not None or self._received.may_be_complete

    # -- a cut ---------------------------------------------------------------------------------------------------

    def prepare_cut(self) -> Iterator[None]:
        """Does the long work of ``handle_cut`` ahead, and yields after each step."""
        return self._planner.parse_request()

    def handle_cut(self, reason: str | None = None) -> Ending | None:
        """Handles a cut: the current upstream has ended, and ``finished`` is false. ``reason``: how it was cut;
        ``None``: as ``cut_reason`` says. Returns the answer's end, or ``None`` if another node may continue."""
        assert not self.finished, "the client has the whole answer"
        self._cut_message = reason or self.cut_reason or "the stream ended before its final frame"
        self._read_unread()
        received, planner = self._received, self._planner
        if self._first_frame_at is not None:
            self._spent_ms += (self._last_frame_at - self._first_frame_at) * 1000.0
        self._hidden_tokens += received.count_hidden_tokens((self.counters and self.counters.tokens) or 0)
        self.abandon_upstream()
        self.cuts += 1
        self._partial_answer = PartialAnswer(
            text="".join(received.texts),
            thinking="".join(received.thinking_texts),
            tokens=received.tokens + self._hidden_tokens,
            spent_ms=self._spent_ms,
            elapsed_ms=(self._clock() - self._started_at) * 1000.0,
            cuts=self.cuts,
            first_frame=received.first_frame,
        )
        if received.is_complete and not planner.is_missing_choices(received):  # only frames after the text are missing
            return self._complete(self._client_format.closing_frames("", self._partial_answer))
        refusal = self._refusal()
        if refusal is not None:
            return self._end_with_refusal(refusal)
        budget = planner.token_budget if received.tokens else None
        if budget is not None and self._partial_answer.tokens >= budget:  # only the frames after the text are missing
            return self._complete(self._client_format.closing_frames("length", self._partial_answer))
        return None

    def next_question(self, node: str, kind: BackendKind) -> HttpCall | None:
        """The next question to the node that will continue: how it continues an answer. ``None`` if no more is to be
        asked."""
        return self._planner.next_question(node, kind, self._partial_answer)

    def apply_reply(self, status: int, body: bytes) -> None:
        """Learns from the node's answer to the last question (its status and its body)."""
        self._planner.apply_reply(status, body)

    def next_call(self, node: str, kind: BackendKind) -> HttpCall | Ending | None:
        """The request to the node that will continue, or the answer's end if no node can continue. ``None``: it is not
        known how this node's model continues, but another node may be able to."""
        self._use_upstream_format(self._client_format)
        has_partial_answer = self._partial_answer.text or self._partial_answer.thinking
        if not has_partial_answer:  # the request is sent again from the start
            return HttpCall("POST", self._path, self._request_body, JSON_HEADERS)
        step = self._planner.next_call(node, kind, self._partial_answer)
        if isinstance(step, str):
            return self._end_with_refusal(step)
        if step is None:
            return None
        self._use_upstream_format(step.stream_format)
        self._repeated_text = RepeatedText(step.repeated_text)
        return step.call

    def _refusal(self) -> str | None:
        """Why no other node can continue the answer; ``None`` if a node can."""
        if not self._resume:
            return "the client asked for no continuation"
        if self.cuts > MAX_CUTS:
            return f"it was cut more than {MAX_CUTS} times"
        return self._planner.refusal(self._received)

    def _complete(self, data: bytes) -> Ending:
        """Ends the answer, which ``data`` completes."""
        self.finished = True
        return Ending(data)

    def _end_with_refusal(self, refusal: str) -> Ending:
        """Ends the answer with an error, because no node can continue it. ``refusal`` is the reason."""
        self.finished = True
        return Ending(error=f"the answer was cut ({self._cut_message}) and could not be continued: {refusal}")
