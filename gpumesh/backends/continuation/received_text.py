"""``ReceivedText``: the text that the client has received, kept so that another node can continue it. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from gpumesh.backends.continuation.stream_format import Frame, JsonObject, StreamFormat, TextPieces

# Ollama's runner ends an answer, without an error, when one token has come more than 30 times in a row. An answer that
# the runner gave up in this way is not continued.
MAX_REPEATED_TOKENS = 30
# Unread frames are kept up to this size. Then they are read, and only their text is kept: it is much shorter.
UNREAD_BYTES = 64 << 10
UNREAD_FRAMES = 4096  # if more frames are in UNREAD_BYTES, they are too short to hold text
FIRST_FRAMES = 64  # one of the first 64 frames names the answer; later frames are not searched
# The most bytes of text that are kept; no model's context holds so much. A longer answer is passed on, but not kept.
TEXT_LIMIT = 8 << 20
MAX_CHOICES = 1024  # choices with higher indexes are not counted: no client asks for so many answers at once
PIECE_BYTES = 64  # the memory that a piece of text takes besides its characters


class ReceivedText:
    """Keeps the text of one answer. ``started``: the client has received at least one frame. ``unread`` holds frames
    that were not read yet; most answers are not cut, so most frames are never read. ``keeps`` is false if the text is
    not kept, or no longer kept.

    ``tokens`` counts the frames with text, ``text_bytes`` the bytes of the text and the thinking that was kept.
    ``first_frame`` is the first frame with a document: it names the answer. ``calls_tools``: a frame held a tool call.
    ``has_other_content``: a frame held content that is no text, ``has_mixed_content``: after the first text.
    ``has_other_choices``: a frame held another choice than the first. ``finished_choices`` counts the choices that are
    complete. These attributes are up to date only after ``read_unread``.
    """

    __slots__ = (
        "_earlier_text_bytes",
        "_earlier_tokens",
        "_finished",
        "_last_tokens",
        "_other_choices",
        "_size",
        "_stream_format",
        "_unmarked",
        "calls_tools",
        "first_frame",
        "has_mixed_content",
        "has_other_content",
        "keeps",
        "started",
        "text_bytes",
        "texts",
        "thinking_texts",
        "tokens",
        "unread",
    )

    def __init__(self, stream_format: StreamFormat, *, keeps: bool) -> None:
        self._stream_format = stream_format
        self.keeps = keeps
        self.started = False
        # The pieces are copied into one array, so that their memory is free at once. A list of the pieces would make
        # the hot path slower by a tenth.
        self.unread = bytearray()
        self.texts: list[str] = []
        self.thinking_texts: list[str] = []
        self.tokens = self.text_bytes = 0
        self._earlier_text_bytes = self._earlier_tokens = 0  # from earlier upstreams
        self.calls_tools = False
        self.has_other_content = self.has_mixed_content = False
        self._other_choices: set[int] = set()  # the indexes of the choices after the first that have come
        self._finished: set[int] = set()
        self._unmarked: set[int] = set()  # the choices that had an empty text as their reason for the end
        self.first_frame: JsonObject | None = None
        self._last_tokens: deque[str] = deque(maxlen=MAX_REPEATED_TOKENS)
        self._size = 0  # about the bytes of memory that the texts take

    @property
    def repeats_itself(self) -> bool:
        """Whether the last MAX_REPEATED_TOKENS tokens are all the same."""
        tokens = self._last_tokens
        return len(tokens) == MAX_REPEATED_TOKENS and len({token.strip() for token in tokens}) == 1

    @property
    def has_other_choices(self) -> bool:
        """Whether a frame held another choice than the first."""
        return bool(self._other_choices)

    @property
    def finished_choices(self) -> int:
        """The number of choices that are complete."""
        return len(self._finished)

    @property
    def is_complete(self) -> bool:
        """Whether every choice that has come is complete, the first among them. Frames after the text may be missing,
        and choices of which nothing has come yet."""
        return 0 in self._finished and self._other_choices <= self._finished

    @property
    def may_be_complete(self) -> bool:
        """Whether the server may end the stream now: every choice is complete, or its server gives no reasons."""
        ended = self._finished | self._unmarked
        return 0 in ended and self._other_choices <= ended

    @property
    def upstream_text_bytes(self) -> int | None:
        """The bytes of text and thinking since the last ``begin_upstream``; ``None`` if they were not counted, or if
        also came what is not counted: tool calls, or several choices."""
        is_counted = self.keeps and not self.calls_tools and not self._other_choices
        return self.text_bytes - self._earlier_text_bytes if is_counted else None

    def begin_upstream(self) -> None:
        """Notes that the next frames come from another upstream."""
        self._earlier_text_bytes, self._earlier_tokens = self.text_bytes, self.tokens

    def count_hidden_tokens(self, counted: int) -> int:
        """How many of the ``counted`` tokens of the current upstream, by its own figure, are beyond its frames with
        text. A token has at least one byte."""
        counted = min(counted, self.text_bytes - self._earlier_text_bytes)
        return max(counted - (self.tokens - self._earlier_tokens), 0)

    def read_unread(self) -> None:
        """Reads the unread frames, and keeps their text instead."""
        if not self.unread:
            return
        frames = bytes(self.unread)
        self.unread.clear()
        if frames.count(self._stream_format.frame_separator) > UNREAD_FRAMES:  # no honest server sends such frames
            self._stop_keeping()
            return
        if self.first_frame is None:
            first_frames = islice(split_frames(self._stream_format, frames), FIRST_FRAMES)
            documents = (self._stream_format.read(frame).document for frame in first_frames)
            self.first_frame = next((document for document in documents if document), None)
        self._add(self._stream_format.extract_texts(frames))

    def add_frame(self, frame: Frame) -> None:
        """Adds a frame that was read before the client got it."""
        self.started = True
        if self.first_frame is None and frame.document is not None:
            self.first_frame = frame.document
        self.calls_tools |= frame.calls_tools
        if frame.choices and frame.choices != (0,):
            self._other_choices.update(index for index in frame.choices if index and index < MAX_CHOICES)
        self._finished.update(index for index in frame.finished_choices if index < MAX_CHOICES)
        self._unmarked.update(index for index in frame.unmarked_choices if index < MAX_CHOICES)
        texts = (frame.text,) if frame.text else ()
        thinking_texts = (frame.thinking,) if frame.thinking else ()
        self._add(TextPieces(texts, thinking_texts, frame.has_other_content))

    def _add(self, pieces: TextPieces) -> None:
        """Counts the pieces, and adds their text unless the text is not kept."""
        self.tokens += len(pieces.texts) + len(pieces.thinking_texts)
        if pieces.has_other_content:
            self.has_other_content = True
            self.has_mixed_content |= bool(self.texts or pieces.texts)
        if not self.keeps:
            return
        text, thinking = "".join(pieces.texts), "".join(pieces.thinking_texts)
        tokens = pieces.texts or pieces.thinking_texts
        self._last_tokens.extend(tokens[-MAX_REPEATED_TOKENS:])
        if text:
            self.texts.append(text)
        if thinking:
            self.thinking_texts.append(thinking)
        self.text_bytes += byte_length(text) + byte_length(thinking)
        self._size += len(text) + len(thinking) + PIECE_BYTES
        if self._size > TEXT_LIMIT:
            self._stop_keeping()

    def _stop_keeping(self) -> None:
        """Drops the text. From now on the answer can only be passed on, but not be continued."""
        self.keeps = False
        self.texts, self.thinking_texts = [], []


def byte_length(text: str) -> int:
    """The length of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def split_frames(stream_format: StreamFormat, frames: bytes) -> Iterator[bytes]:
    """Yields each frame with its end mark. All blank lines after a frame belong to its end mark."""
    start = 0
    for match in stream_format.frame_end_pattern.finditer(frames):
        yield frames[start : match.end()]
        start = match.end()
