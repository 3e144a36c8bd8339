"""One answer to the client out of several upstream streams: a cut one is continued where it stopped. Pure, no I/O.

How a proxy drives it::

    answer = Continuation(path, request_body, clock=time.monotonic, ways=ways)
    upstream = send(original call)
    while True:
        for data in upstream:                            # until it ends, breaks, or stays silent for too long
            client.write(answer.feed(data))
            if answer.finished or answer.cut: break
        if answer.finished: break
        abort upstream; choose another node
        if (question := answer.render_call()) is not None:   # at most one short question, on the node chosen
            answer.rendered(*ask(question))                  # status and body; leave out if it failed
        step = answer.on_cut(reason)
        if isinstance(step, Ending): client.write(step.data); break   # step.error: why, or None if complete
        upstream = send(step)                            # a failure before its first byte: send it to another node

Only whole frames are passed on, so a cut never leaves half a line with the client, and what was passed on is exactly
what the next node is told to continue: nothing is lost, nothing repeated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from enum import StrEnum

from gpumesh.backends import jsons
from gpumesh.backends.base import HttpCall
from gpumesh.backends.frames import LINE_LIMIT
from gpumesh.backends.resume_forms import SENTINEL, Form, Frame, Sofar, form_of

MAX_CUTS = 3
# Ollama's runner stops, silently, after one token came more than 30 times; what it gave up is not continued.
REPEATS = 30
# Passed on unread up to here; then read, so that a long answer is held as its text and not as its frames.
UNREAD_BYTES = 16 << 10


class Way(StrEnum):
    """How a model's template lets an answer be continued."""

    ASSISTANT_LAST = "assistant-last"
    RAW = "raw"


Ways = MutableMapping[str, Way]
"""What was found out, by model; keep one for the gateway's life."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The last bytes for the client. ``error`` is ``None`` when the answer is complete after all."""

    data: bytes
    error: str | None = None


class Continuation:
    """``finished``: the client has the whole answer. ``cut``: why this upstream must not be read further (an error
    frame, or no frame at all), while the client's answer is open still. ``resume`` is false for
    ``X-GPUMesh-Resume: off``; ``clock`` gives seconds."""

    def __init__(
        self,
        path: str,
        request: bytes,
        *,
        clock: Callable[[], float],
        ways: Ways | None = None,
        resume: bool = True,
    ) -> None:
        self._path = path
        self._request_body = request
        self._request = jsons.parse_object(request) or {}
        self._form: Form = form_of(path)
        self._clock = clock
        self._ways: Ways = {} if ways is None else ways
        self._resume = resume
        self._began = clock()
        self._held = b""
        self._unread: list[bytes] = []
        self._unread_size = 0
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._tail: deque[str] = deque(maxlen=REPEATS)
        self._tools = False
        self._complete = False
        self._sofar = Sofar()
        self._before = self._sofar
        self._first_at: float | None = None
        self._last_at = 0.0
        self._prompt: str | None = None
        self.finished = False
        self.cut: str | None = None

    @property
    def cuts(self) -> int:
        return self._sofar.cuts

    @property
    def tokens(self) -> int:
        """Frames with text that the client has got: about so many tokens."""
        self._read_unread()
        return self._sofar.tokens

    @property
    def text(self) -> str:
        """What the client has got of the answer's text."""
        self._read_unread()
        return "".join(self._texts)

    # -- upstream to client --------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> bytes:
        """What the client gets for these bytes of the current upstream; empty after its end or a cut."""
        if self.finished or self.cut is not None:
            return b""
        whole = self._whole_frames(data)
        if not whole:
            return b""
        self._last_at = self._clock()
        if self._first_at is None:
            self._first_at = self._last_at
        if self._sofar.cuts == 0 and not self._form.marks.search(whole):
            # By far the most common: text as the client shall have it, looked at only if it is ever needed.
            self._unread.append(whole)
            self._unread_size += len(whole)
            if self._unread_size > UNREAD_BYTES:
                self._read_unread()
            return whole
        self._read_unread()
        return b"".join(self._pass_on(frame) for frame in self._split(whole))

    def _whole_frames(self, data: bytes) -> bytes:
        text = self._held + data if self._held else data
        # The end of a frame is at most four bytes: what was held without one need not be searched again.
        start = max(len(self._held) - 4, 0)
        end = 0
        for found in self._form.end.finditer(text, start):
            end = found.end()
        self._held = text[end:]
        if len(self._held) > LINE_LIMIT:
            self._held = b""
            self.cut = f"a frame of more than {LINE_LIMIT >> 20} MiB"
        return text[:end]

    def _split(self, whole: bytes) -> list[bytes]:
        frames, start = [], 0
        for found in self._form.end.finditer(whole):
            frames.append(whole[start : found.end()])
            start = found.end()
        return frames

    def _pass_on(self, raw: bytes) -> bytes:
        if self.finished or self.cut is not None:
            return b""
        frame = self._form.read(raw)
        if frame.error is not None:
            self.cut = frame.error
            return b""
        if frame.last and not self._ends_rightly(frame):
            self.cut = "the stream ended without a reason to"
            return b""
        if self._sofar.cuts:
            elapsed_ms = (self._clock() - self._began) * 1000.0
            # Figures and notes speak of what came before this attempt: the last one's own are in its frame.
            raw = self._form.translate(frame, replace(self._before, elapsed_ms=elapsed_ms))
        self._note(frame)
        self.finished = frame.last
        return raw

    def _ends_rightly(self, frame: Frame) -> bool:
        """OpenAI's ``[DONE]`` may follow a failure, too: then no reason to finish came before it."""
        return self._path != "/v1/chat/completions" or self._complete or (frame.complete and frame.document is not None)

    def _read_unread(self) -> None:
        unread, self._unread, self._unread_size = b"".join(self._unread), [], 0
        for raw in self._split(unread):
            self._note(self._form.read(raw))

    def _note(self, frame: Frame) -> None:
        if self._sofar.head is None and frame.document is not None:
            self._sofar = replace(self._sofar, head=frame.document)
        self._tools |= frame.tools
        self._complete |= frame.complete and frame.document is not None
        if frame.text:
            self._texts.append(frame.text)
        if frame.thinking:
            self._thoughts.append(frame.thinking)
        if frame.text or frame.thinking:
            self._tail.append((frame.text or frame.thinking).strip())
            self._sofar = replace(self._sofar, tokens=self._sofar.tokens + 1)

    # -- a cut ---------------------------------------------------------------------------------------------------

    def render_call(self) -> HttpCall | None:
        """What to ask of the node that will go on, before ``on_cut``; ``None`` when nothing need be asked."""
        if self._refusal() is not None or not self.text or self._thoughts:
            return None
        if self._prompt is not None or self._ways.get(self._model) is Way.ASSISTANT_LAST:
            return None
        return self._form.render_call(self._request)

    def rendered(self, status: int, body: bytes) -> None:
        """The answer to ``render_call``. One that tells nothing leaves the common way: assistant last."""
        document = (jsons.parse_object(body) if status == 200 else None) or {}
        info = document.get("_debug_info")
        prompt = jsons.text(info.get("rendered_template")) if isinstance(info, dict) else None
        if prompt is None or prompt.count(SENTINEL) != 1:
            return
        before, _, after = prompt.partition(SENTINEL)
        if after.strip():
            self._ways[self._model] = Way.RAW
            self._prompt = before
        else:
            self._ways[self._model] = Way.ASSISTANT_LAST

    def on_cut(self, reason: str | None = None) -> HttpCall | Ending:
        """The current upstream is over, and ``finished`` is false: how to go on, or the explicit end."""
        assert not self.finished, "the client has the whole answer"
        why = reason or self.cut or "the stream ended before its final frame"
        text = self.text
        self._held = b""
        self.cut = None
        if self._first_at is not None:
            spent_ms = self._sofar.spent_ms + (self._last_at - self._first_at) * 1000.0
            self._sofar = replace(self._sofar, spent_ms=spent_ms)
            self._first_at = None
        self._sofar = replace(
            self._sofar,
            text=text,
            thinking="".join(self._thoughts),
            elapsed_ms=(self._clock() - self._began) * 1000.0,
            cuts=self._sofar.cuts + 1,
        )
        if self._complete:  # the text is whole, only what stands after it is missing
            return self._ended(self._form.close("", self._sofar))
        refusal = self._refusal()
        if refusal is not None:
            message = f"the answer was cut ({why}) and could not be continued: {refusal}"
            return self._ended(self._form.error(message), message)
        self._before = self._sofar
        if not text and not self._thoughts:
            return HttpCall("POST", self._path, self._request_body, (("Content-Type", "application/json"),))
        budget = self._form.budget(self._request)
        if budget is not None and self._sofar.tokens >= budget:
            return self._ended(self._form.close("length", self._sofar))
        return self._form.call(self._request, self._sofar, self._prompt)

    def _ended(self, data: bytes, error: str | None = None) -> Ending:
        self.finished = True
        return Ending(data, error)

    @property
    def _model(self) -> str:
        return jsons.text(self._request.get("model")) or ""

    def _refusal(self) -> str | None:
        if not self._resume:
            return "the client asked for no continuation"
        if self._sofar.cuts > MAX_CUTS:
            return f"it was cut more than {MAX_CUTS} times"
        if not self._texts and not self._thoughts and not self._tools:
            return None  # nothing was said yet: it is asked anew
        if self._tools:
            return "it calls tools"
        if self._thoughts and not self._texts:
            return "the model was still thinking"
        if len(self._tail) == REPEATS and len(set(self._tail)) == 1:
            return "it repeats itself"
        return self._form.refusal(self._request)
