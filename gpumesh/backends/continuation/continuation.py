"""One answer to the client out of several upstream streams: a cut one is continued where it stopped. Pure, no I/O.

How a proxy drives it::

    answer = Continuation(path, request_body, clock=time.monotonic, ways=ways)
    upstream = send(original call)
    while True:
        for data in upstream:                            # until it ends, breaks, or stays silent for too long
            client.write(answer.feed(data))
            if answer.finished or answer.cut: break
        else: client.write(answer.end_of_body())         # only where the body ended as HTTP has it
        if answer.finished: break
        abort upstream
        if (ending := answer.on_cut(reason)) is None:
            choose another node
            if (question := answer.render_call(node, kind)):   # at most one short question, on the node chosen
                answer.rendered(node, *ask(question))    # status and body; leave out if it failed
            ending = answer.next_call(node, kind)
        if isinstance(ending, Ending): break             # ending.data completes it, or ending.error says why not
        upstream = send(ending)                          # fails before `feed` gave anything: the next node

Only whole frames are passed on, so a cut never leaves half a line with the client, and what was passed on is exactly
what the next node is told to continue: nothing is lost, nothing repeated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import islice

from gpumesh.backends import safe_json
from gpumesh.backends.base import HttpCall, ServerCounters
from gpumesh.backends.continuation.stream_format import (
    Frame,
    JsonObject,
    PartialAnswer,
    StreamFormat,
    TextPieces,
)
from gpumesh.backends.continuation.stream_formats import continuation_format_for, stream_format_for
from gpumesh.backends.dialects import find_counters
from gpumesh.backends.frames import LINE_LIMIT
from gpumesh.backends.ollama import JSON_HEADERS
from gpumesh.topology import BackendKind

MAX_CUTS = 3
# Ollama's runner stops, silently, after one token came more than 30 times; what it gave up is not continued.
MAX_REPEATED_TOKENS = 30
# Passed on unread up to here; then read, so that a long answer is held as its text and not as its frames.
UNREAD_BYTES = 64 << 10
UNREAD_FRAMES = 4096  # so many in so few bytes hold no text
FIRST_FRAMES = 64  # of those, among which one names the answer
# No model's context holds so much; an answer that grows past it is passed on, but not held.
TEXT_LIMIT = 8 << 20
PIECE_BYTES = 64  # what a piece of it costs beside its text
# What a request may cost when it is taken apart for another node (``jsons.cost``): 16 MiB of images, or 300,000 values.
REQUEST_COST = 64 << 20


class ContinuationStrategy(StrEnum):
    """How a model's template lets an answer be continued."""

    ASSISTANT_LAST = "assistant-last"
    RAW = "raw"


ContinuationStrategies = MutableMapping[tuple[str, str], ContinuationStrategy]
"""What was found out, by node and model, for one name may be two templates; keep one for the gateway's life."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of an answer that is not sent on: ``data`` completes it, unless ``error`` says why it is incomplete."""

    data: bytes = b""
    error: str | None = None


class Continuation:
    """``finished``: the client has the whole answer. ``cut_reason``: why this upstream must not be read further (an
    error frame, or no frame at all), while the client's answer is open still. ``frame_separator`` ends a frame of the
    current upstream: so many of them, so many tokens, about. ``counters``: its own figures, once it gave them, and
    ``answer_counters`` those of the whole answer. ``resume`` is false for ``X-GPUMesh-Resume: off``; ``clock`` gives
    seconds, and ``began`` is when the request came, if that was before now. ``hold``: whether so many bytes more may be
    held for it; the request is taken apart only after a cut, and only then."""

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
        self._source = self._form
        self._next_form = self._form
        self.frame_separator = self._form.frame_separator
        self._clock = clock
        self._ways: ContinuationStrategies = {} if strategies is None else strategies
        self._resume = resume
        self._hold = reserve_bytes
        self._keeps = resume and self._form.supports_continuation
        self._began = clock() if started_at is None else started_at
        self._held = bytearray()  # the beginning of a frame
        self._passed = False
        # Copied, so that each piece's own memory is used again at once: a list of them costs a tenth of the hot path.
        self._unread = bytearray()
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._size = 0
        self._tokens = 0
        self._tail: deque[str] = deque(maxlen=MAX_REPEATED_TOKENS)
        self._tools = False
        self._complete = False
        self._head: JsonObject | None = None
        self._first_at: float | None = None
        self._last_at = 0.0
        self._spent_ms = 0.0
        self._sofar = PartialAnswer()
        self._prompt: str | None = None
        self._why = ""
        self.cuts = 0
        self.finished = False
        self.cut_reason: str | None = None
        self.counters: ServerCounters | None = None
        self.answer_counters: ServerCounters | None = None

    @cached_property
    def _affordable(self) -> bool:
        """Whether there is room to take the request apart."""
        cost = safe_json.estimate_memory(self._request_body, REQUEST_COST)
        return cost is not None and self._hold(cost)

    @cached_property
    def _request(self) -> JsonObject:
        return (safe_json.parse_object(self._request_body) if self._affordable else None) or {}

    @property
    def tokens(self) -> int:
        """Frames with text that the client has got: about so many tokens."""
        self._read_unread()
        return self._tokens

    @property
    def text(self) -> str:
        """What the client has got of the answer's text."""
        self._read_unread()
        return "".join(self._texts)

    @property
    def continuable(self) -> bool:
        """Whether another node could go on, were this upstream cut now."""
        self._read_unread()
        return self.cuts < MAX_CUTS and self._refusal() is None

    def error_frame(self, message: str) -> bytes:
        """An explicit error in the client's dialect, inside of the stream."""
        return self._form.error_frame(message)

    # -- upstream to client --------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> bytes:
        """What the client gets for these bytes of the current upstream; empty after its end or a cut."""
        if self.finished or self.cut_reason is not None:
            return b""
        if self._held or not data.endswith(self.frame_separator):
            data = self._whole_frames(data)
            if not data:
                return b""
        self._now()
        if not self.cuts and self._source.is_text_only(data):
            # By far the most common: text as the client shall have it, looked at only if it is ever needed.
            self._passed = True
            if self._keeps:
                self._unread += data
                if len(self._unread) > UNREAD_BYTES:
                    self._read_unread()
            return data
        return self._pass_on_all(data)

    def finish_body(self) -> bytes:
        """The upstream's body ended as it should: its last frame may lack its end mark. Half a frame is a cut."""
        raw = bytes(self._held) + self.frame_separator
        self._held.clear()
        if self.finished or self.cut_reason is not None:
            return b""
        frame = self._source.read(raw)
        self.cut_reason = frame.error
        if frame.error is not None or (frame.document is None and not frame.ends_stream):
            return b""
        self._now()
        return self._pass_on_all(raw)

    def abandon_upstream(self) -> None:
        """The current upstream failed before it gave anything: another one takes its place."""
        self._held.clear()
        self.cut_reason = None
        self.counters = None
        self._first_at = None

    def _whole_frames(self, data: bytes) -> bytes:
        held = self._held
        # The end of a frame is at most four bytes: what was held without one need not be searched again.
        start = max(len(held) - 4, 0)
        held += data
        end = self._source.find_last_frame_end(held, start)
        whole = bytes(held[:end]) if end else b""
        del held[:end]
        if len(held) > LINE_LIMIT:
            held.clear()
            self.cut_reason = f"a frame of more than {LINE_LIMIT >> 20} MiB"
        return whole

    def _split(self, whole: bytes) -> Iterator[bytes]:
        start = 0
        for found in self._source.frame_end_pattern.finditer(whole):
            yield whole[start : found.end()]
            start = found.end()

    def _now(self) -> None:
        self._last_at = self._clock()
        if self._first_at is None:
            self._first_at = self._last_at

    def _pass_on_all(self, whole: bytes) -> bytes:
        self._read_unread()
        return b"".join([self._pass_on(frame) for frame in self._split(whole)])

    def _pass_on(self, raw: bytes) -> bytes:
        if self.finished or self.cut_reason is not None:
            return b""
        frame = self._source.read(raw)
        if frame.error is not None:
            self.cut_reason = frame.error
            return b""
        if frame.ends_stream and not self._ends_rightly(frame):
            self.cut_reason = "the stream ended without a reason to"
            return b""
        counted = find_counters(raw) if frame.ends_stream or b'"usage":{' in raw or b'"timings"' in raw else None
        self.counters = counted or self.counters
        if self.cuts:
            elapsed_ms = (self._clock() - self._began) * 1000.0
            # Figures and notes speak of what came before this attempt: the last one's own are in its frame.
            raw = self._source.translate(frame, replace(self._sofar, elapsed_ms=elapsed_ms))
            counted = None if counted is None else find_counters(raw)
        self.answer_counters = counted or self.answer_counters
        self._note(frame)
        self.finished = frame.ends_stream
        return raw

    def _ends_rightly(self, frame: Frame) -> bool:
        """OpenAI's ``[DONE]`` may follow a failure, too: then no reason to finish came before it."""
        return frame.document is not None or not self._form.supports_continuation or self._complete

    # -- what was said -------------------------------------------------------------------------------------------

    def _read_unread(self) -> None:
        if not self._unread:
            return
        unread, self._unread = bytes(self._unread), bytearray()
        if unread.count(self.frame_separator) > UNREAD_FRAMES:
            self._forget_text()
            return
        if self._head is None:
            first = islice(self._split(unread), FIRST_FRAMES)
            self._head = next((found for raw in first if (found := self._form.read(raw).document)), None)
        self._add(self._form.extract_texts(unread))

    def _note(self, frame: Frame) -> None:
        self._passed = True
        if self._head is None and frame.document is not None:
            self._head = frame.document
        self._tools |= frame.calls_tools
        self._complete |= frame.text_complete and frame.document is not None
        self._add(TextPieces((frame.text,) * bool(frame.text), (frame.thinking,) * bool(frame.thinking)))

    def _add(self, said: TextPieces) -> None:
        self._tokens += len(said.texts) + len(said.thinking_texts)
        if not self._keeps:
            return
        text, thinking = "".join(said.texts), "".join(said.thinking_texts)
        self._tail.extend((said.texts or said.thinking_texts)[-MAX_REPEATED_TOKENS:])
        if text:
            self._texts.append(text)
        if thinking:
            self._thoughts.append(thinking)
        self._size += len(text) + len(thinking) + PIECE_BYTES
        if self._size > TEXT_LIMIT:
            self._forget_text()

    def _forget_text(self) -> None:
        """From now on it is passed on, and cannot be continued."""
        self._keeps = False
        self._texts, self._thoughts = [], []

    # -- a cut ---------------------------------------------------------------------------------------------------

    def handle_cut(self, reason: str | None = None) -> Ending | None:
        """The current upstream is over, and ``finished`` is false. ``None``: another node may go on."""
        assert not self.finished, "the client has the whole answer"
        self._why = reason or self.cut_reason or "the stream ended before its final frame"
        self._read_unread()
        if self._first_at is not None:
            self._spent_ms += (self._last_at - self._first_at) * 1000.0
        self.abandon_upstream()
        self.cuts += 1
        self._sofar = PartialAnswer(
            text="".join(self._texts),
            thinking="".join(self._thoughts),
            tokens=self._tokens,
            spent_ms=self._spent_ms,
            elapsed_ms=(self._clock() - self._began) * 1000.0,
            cuts=self.cuts,
            first_frame=self._head,
        )
        if self._complete:  # the text is whole, only what stands after it is missing
            return self._ended(self._form.closing_frames("", self._sofar))
        refusal = self._refusal()
        if refusal is not None:
            return self._refused(refusal)
        budget = self._form.budget(self._request) if self._tokens else None
        if budget is not None and self._tokens >= budget:
            return self._ended(self._form.closing_frames("length", self._sofar))
        return None

    def render_call(self, node: str, kind: BackendKind) -> HttpCall | None:
        """What to ask of the node that will go on; ``None`` when nothing need be asked."""
        way = self._ways.get((node, self._model))
        form = continuation_format_for(self._path, kind)
        if type(form) is not type(self._next_form):
            self._prompt = None  # another kind of server rendered it
        self._next_form = form
        known = way is ContinuationStrategy.ASSISTANT_LAST or (
            way is ContinuationStrategy.RAW and self._prompt is not None
        )
        if known or not self._asks(form):
            return None
        return form.render_call(self._request, self._sofar.thinking)

    def apply_rendered_prompt(self, node: str, status: int, body: bytes) -> None:
        """The answer to ``render_call``. One that tells nothing leaves the common way: assistant last."""
        document = (safe_json.parse_object(body) if status == 200 else None) or {}
        rendered = self._next_form.read_rendered_prompt(document)
        if rendered is None:
            return
        if rendered.closes_turn:
            self._ways[node, self._model] = ContinuationStrategy.RAW
            self._prompt = rendered.text
        else:
            self._ways[node, self._model] = ContinuationStrategy.ASSISTANT_LAST

    def next_call(self, node: str, kind: BackendKind) -> HttpCall | Ending | None:
        """What to send to the node that will go on. ``None``: that one did not say how; another may."""
        self._read_with(self._form)
        if not self._texts and not self._thoughts:
            return HttpCall("POST", self._path, self._request_body, JSON_HEADERS)
        form = continuation_format_for(self._path, kind)
        raw = self._asks(form) and self._ways.get((node, self._model)) is ContinuationStrategy.RAW
        refusal = form.raw_prompt_refusal(self._request) if raw else form.assistant_message_refusal(self._request)
        if refusal is not None:
            return self._refused(refusal)
        if not raw:
            rest = form.continue_assistant_message(self._request, self._sofar)
        elif self._prompt is not None:
            rest = form.continue_raw_prompt(self._request, self._sofar, self._prompt)
        else:
            return None
        self._read_with(rest.form)
        return rest.call

    def _read_with(self, form: StreamFormat) -> None:
        self._source, self.frame_separator = form, form.frame_separator

    def _asks(self, form: StreamFormat) -> bool:
        """Whether it depends on the model's template how the text so far is continued."""
        return bool(self._texts) and form.uses_template(self._request)

    def _ended(self, data: bytes) -> Ending:
        self.finished = True
        return Ending(data)

    def _refused(self, refusal: str) -> Ending:
        self.finished = True
        return Ending(error=f"the answer was cut ({self._why}) and could not be continued: {refusal}")

    @property
    def _model(self) -> str:
        return safe_json.as_text(self._request.get("model")) or ""

    def _refusal(self) -> str | None:
        if not self._resume:
            return "the client asked for no continuation"
        if self.cuts > MAX_CUTS:
            return f"it was cut more than {MAX_CUTS} times"
        if not self._passed or (not self._tokens and not self._tools and self._keeps):
            return None  # nothing was said yet: it is asked anew
        if self._form.supports_continuation and not self._keeps:
            return "it is too long to be held"
        if self._tools:
            return "it calls tools"
        if self._thoughts and not self._texts:
            return "the model was still thinking"
        if len(self._tail) == MAX_REPEATED_TOKENS and len({piece.strip() for piece in self._tail}) == 1:
            return "it repeats itself"
        if not self._affordable:
            return "its request is too large to be taken apart for another node"
        return self._form.continuation_refusal(self._request)
