"""What the client has received of an answer, kept so that another node can continue it. Bounded. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from gpumesh.backends.continuation.stream_format import Frame, JsonObject, StreamFormat, TextPieces

# Ollama's runner stops, silently, after one token came more than 30 times. An answer that it gave up is not continued.
MAX_REPEATED_TOKENS = 30
# Frames are kept unread up to here. Then they are read: a long answer is held as its text, and not as its frames.
UNREAD_BYTES = 64 << 10
UNREAD_FRAMES = 4096  # so many frames in so few bytes hold no text
FIRST_FRAMES = 64  # of unread frames, among which one names the answer
# No model's context holds so much. An answer that grows past it is passed on, but not kept.
TEXT_LIMIT = 8 << 20
PIECE_BYTES = 64  # what a piece of text costs besides its characters


class ReceivedText:
    """``started``: the client has received at least one frame. ``unread`` holds frames that were not read yet: most
    answers are never cut, so they are never read. ``keeps`` is false where the text is not kept, or no longer.

    ``tokens`` counts frames with text, ``first_frame`` is the first frame with a document: it names the answer.
    ``calls_tools``: a frame held a tool call. ``is_complete``: the text is whole, and only what follows it is missing.
    All of them are right after ``read_unread``.
    """

    __slots__ = (
        "_form",
        "_last_tokens",
        "_size",
        "calls_tools",
        "first_frame",
        "is_complete",
        "keeps",
        "started",
        "texts",
        "thinking_texts",
        "tokens",
        "unread",
    )

    def __init__(self, form: StreamFormat, *, keeps: bool) -> None:
        self._form = form
        self.keeps = keeps
        self.started = False
        # Copied, so that each piece's own memory is used again at once: a list of pieces costs a tenth of the hot path.
        self.unread = bytearray()
        self.texts: list[str] = []
        self.thinking_texts: list[str] = []
        self.tokens = 0
        self.calls_tools = False
        self.is_complete = False
        self.first_frame: JsonObject | None = None
        self._last_tokens: deque[str] = deque(maxlen=MAX_REPEATED_TOKENS)
        self._size = 0

    @property
    def repeats_itself(self) -> bool:
        last = self._last_tokens
        return len(last) == MAX_REPEATED_TOKENS and len({token.strip() for token in last}) == 1

    def read_unread(self) -> None:
        if not self.unread:
            return
        frames = bytes(self.unread)
        self.unread.clear()
        if frames.count(self._form.frame_separator) > UNREAD_FRAMES:
            self._stop_keeping()
            return
        if self.first_frame is None:
            first_frames = islice(split_frames(self._form, frames), FIRST_FRAMES)
            documents = (self._form.read(frame).document for frame in first_frames)
            self.first_frame = next((document for document in documents if document), None)
        self._add(self._form.extract_texts(frames))

    def add_frame(self, frame: Frame) -> None:
        """A frame that was read before the client got it."""
        self.started = True
        if self.first_frame is None and frame.document is not None:
            self.first_frame = frame.document
        self.calls_tools |= frame.calls_tools
        self.is_complete |= frame.text_complete and frame.document is not None
        self._add(TextPieces((frame.text,) * bool(frame.text), (frame.thinking,) * bool(frame.thinking)))

    def _add(self, pieces: TextPieces) -> None:
        self.tokens += len(pieces.texts) + len(pieces.thinking_texts)
        if not self.keeps:
            return
        text, thinking = "".join(pieces.texts), "".join(pieces.thinking_texts)
        self._last_tokens.extend((pieces.texts or pieces.thinking_texts)[-MAX_REPEATED_TOKENS:])
        if text:
            self.texts.append(text)
        if thinking:
            self.thinking_texts.append(thinking)
        self._size += len(text) + len(thinking) + PIECE_BYTES
        if self._size > TEXT_LIMIT:
            self._stop_keeping()

    def _stop_keeping(self) -> None:
        """From now on the answer is passed on, and cannot be continued."""
        self.keeps = False
        self.texts, self.thinking_texts = [], []


def split_frames(form: StreamFormat, frames: bytes) -> Iterator[bytes]:
    """Each frame with its end. A run of blank lines after a frame is part of its end, however long the run is."""
    start = 0
    for match in form.frame_end_pattern.finditer(frames):
        yield frames[start : match.end()]
        start = match.end()
