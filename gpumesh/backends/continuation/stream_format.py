"""``StreamFormat``: what ``Continuation`` must know of a stream's format to read, continue and end the stream. Pure.

Most models' templates leave a last message of the assistant open: the model continues it, and the reply holds only the
new text. Other templates close the turn. Then the server renders the prompt, and continues the prompt with the partial
answer after it, as raw text. The source of this is docs/internals/ollama.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gpumesh.backends import safe_json
from gpumesh.backends.base import HttpCall

JsonObject = Mapping[str, Any]
# Stands for the answer's text when a server is asked to render a prompt. No model generates this text.
SENTINEL = "gpumesh8f1d2c7e5b3a9046"


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a stream. ``document`` is its JSON object; ``None`` if it holds none. ``calls_tools``: it holds a
    call of a tool. ``text_complete``: the text ends with this frame. ``ends_stream``: no frame follows. ``error``: the
    server's error, or why the frame is not valid; ``None`` for a frame without an error."""

    document: JsonObject | None = None
    text: str = ""
    thinking: str = ""
    calls_tools: bool = False
    text_complete: bool = False
    ends_stream: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TextPieces:
    """The pieces of text and of thinking, in order, without empty pieces."""

    texts: tuple[str, ...] = ()
    thinking_texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PartialAnswer:
    """The part of the answer that the client has received, over all attempts.

    ``tokens`` counts its frames with text: about as many tokens. ``spent_ms``: the time in which the servers generated
    this part. ``elapsed_ms``: the time since the request began. ``cuts``: how often the answer was cut. ``first_frame``
    is the first document of the stream, which names the answer; ``None`` if no document has come.
    """

    text: str = ""
    thinking: str = ""
    tokens: int = 0
    spent_ms: float = 0.0
    elapsed_ms: float = 0.0
    cuts: int = 0
    first_frame: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class ContinuationCall:
    """The request for the rest of an answer. ``stream_format`` reads the stream that comes back, and translates each of
    its frames into a frame of the client's own stream."""

    call: HttpCall
    stream_format: StreamFormat


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A chat as the model reads it, up to the answer. ``closes_turn``: the model's template closes a last message of
    the assistant, so the partial answer must be sent as text after this prompt."""

    text: str
    closes_turn: bool


class StreamFormat(Protocol):
    """The format of the streams of one API. ``frame_end_pattern`` matches the end of a frame, ``frame_separator`` is
    the most common end.

    ``supports_continuation``: an answer in this format can be continued, so its text is kept.
    """

    frame_separator: bytes
    frame_end_pattern: re.Pattern[bytes]
    supports_continuation: bool

    def find_marks(self, frames: bytes) -> object | None:
        """Looks for a frame that holds more than text. ``None``: all frames hold text only, so they need not be read.
        This must be cheap: each streamed token passes here."""

    def find_last_frame_end(self, frames: bytearray, start: int) -> int:
        """The position after the last end of a frame, searched from ``start`` on; 0 if there is none."""

    def read(self, frame: bytes) -> Frame:
        """Parses one frame."""

    def extract_texts(self, frames: bytes) -> TextPieces:
        """The texts of many frames that hold text only. Costs a tenth of a call of ``read`` for each frame."""

    def continuation_refusal(self, request: JsonObject) -> str | None:
        """Why an answer to this request cannot be continued correctly; ``None`` if it can."""

    def token_budget(self, request: JsonObject) -> int | None:
        """The client's limit for the tokens of the answer; ``None`` without one."""

    def uses_template(self, request: JsonObject) -> bool:
        """Whether the server applies the model's template to this request."""

    def render_call(self, request: JsonObject, thinking: str) -> HttpCall | None:
        """The request that asks the server to render the prompt up to the answer. ``None`` if this would not help."""

    def raw_prompt_refusal(self, request: JsonObject) -> str | None:
        """Why ``continue_raw_prompt`` cannot continue the answer correctly; ``None`` if it can."""

    def continue_raw_prompt(self, request: JsonObject, partial_answer: PartialAnswer, prompt: str) -> ContinuationCall:
        """Makes the request that sends the partial answer as text after the rendered prompt. This is for templates that
        close the turn."""

    def read_rendered_prompt(self, document: JsonObject) -> RenderedPrompt | None:
        """The prompt in the answer to ``render_call``; ``None`` if the answer holds none."""

    def assistant_message_refusal(self, request: JsonObject) -> str | None:
        """Why ``continue_assistant_message`` cannot continue the answer correctly; ``None`` if it can."""

    def continue_assistant_message(self, request: JsonObject, partial_answer: PartialAnswer) -> ContinuationCall:
        """Makes the request that sends the partial answer as a last message of the assistant."""

    def translate(self, frame: Frame, partial_answer: PartialAnswer) -> bytes:
        """Translates a frame of a later attempt into frames of the client's own stream, with corrected figures. The
        result is empty if the client must not get this frame."""

    def closing_frames(self, reason: str, partial_answer: PartialAnswer) -> bytes:
        """The frames that complete a stream whose text is complete.

        ``reason`` is the finish reason, or empty if the client has received it.
        """

    def error_frame(self, message: str) -> bytes:
        """The frame of an error that ends the client's stream, for example when a cut answer cannot be continued.

        Streams of routes that generate no text end with ``gateway.error_shapes.error_frame`` instead. The type of that
        error follows from a status. Here the status 200 was sent already, so the error has no status.
        """


def read_debug_rendering(document: JsonObject) -> RenderedPrompt | None:
    """Reads Ollama's answer to a chat with ``_debug_render_only`` and SENTINEL as the partial answer. ``None`` if the
    answer holds no prompt, or one in which the sentinel is not exactly once."""
    info = document.get("_debug_info")
    prompt = safe_json.as_text(info.get("rendered_template")) if isinstance(info, dict) else None
    if prompt is None or prompt.count(SENTINEL) != 1:
        return None
    before, _, after = prompt.partition(SENTINEL)
    return RenderedPrompt(before, closes_turn=bool(after.strip()))  # text after the partial answer closes the turn


def append_answer(messages: list[Any], text: str, thinking_key: str, thinking: str) -> list[Any]:
    """The messages with the partial answer as the last message. If the client began the answer itself, the partial
    answer is joined to the client's message. ``thinking_key`` is the member of a message that holds its thinking."""
    if client_began_answer(messages):
        last = messages[-1]
        return [*messages[:-1], {**last, "content": last["content"] + text}]
    message = {"role": "assistant", "content": text}
    return [*messages, message | {thinking_key: thinking} if thinking else message]


def client_began_answer(messages: Any) -> bool:
    """Whether the last message is a text of the assistant: the client began the answer, and the model continues it."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict):
        return False
    return last.get("role") == "assistant" and isinstance(last.get("content"), str)


def find_strings(pattern: re.Pattern[bytes], frames: bytes) -> TextPieces | None:
    """The JSON strings that the pattern finds, without parsing the frames. ``None`` if they are not valid JSON.

    The pattern begins with a key in quotation marks. A quotation mark inside of a string is escaped, so the pattern
    cannot match inside of a text.
    """
    strings = safe_json.parse(b"[" + b",".join(pattern.findall(frames)) + b"]")
    if not isinstance(strings, list):
        return None
    return TextPieces(tuple(filter(None, strings)))  # without empty strings


def collect_texts(pairs: Iterable[tuple[str, str]]) -> TextPieces:
    """The texts and the thinking of many frames, without empty pieces. ``pairs`` holds both of each frame."""
    all_pairs = list(pairs)
    texts = tuple(text for text, _ in all_pairs if text)
    thinking_texts = tuple(thinking for _, thinking in all_pairs if thinking)
    return TextPieces(texts, thinking_texts)


def continuation_note(partial_answer: PartialAnswer) -> dict[str, int]:
    """The member ``gpumesh`` of the last frame: it reports the continuations."""
    return {"continued": partial_answer.cuts, "tokens_before": partial_answer.tokens}


def positive_count(value: Any) -> int | None:
    """The value if it is a count of at least 1; ``None`` for anything else."""
    return safe_json.as_count(value) or None
