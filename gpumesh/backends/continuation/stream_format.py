"""The interface of a stream's form for ``continuation.Continuation``: how it is read, continued and ended. Pure.

Most models' templates continue a last message of the assistant, so that the reply holds only the new text. Templates
that close the turn are continued as raw text after the prompt, as the server itself renders the prompt. Where this is
known from: docs/internals/ollama.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gpumesh.backends import safe_json
from gpumesh.backends.base import HttpCall

JsonObject = Mapping[str, Any]
# Takes the place of the answer's text when a server is asked to render a prompt. No model generates it.
SENTINEL = "gpumesh8f1d2c7e5b3a9046"


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a stream. ``text_complete``: the text ends with it; ``ends_stream``: nothing comes after it."""

    document: JsonObject | None = None
    text: str = ""
    thinking: str = ""
    calls_tools: bool = False
    text_complete: bool = False
    ends_stream: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TextPieces:
    """The pieces of text and of thinking, in order; empty ones left out."""

    texts: tuple[str, ...] = ()
    thinking_texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PartialAnswer:
    """What the client has got, over all attempts. ``spent_ms``: time spent generating what was cut; ``elapsed_ms``:
    since the request began; ``first_frame``: the first frame, which names the answer."""

    text: str = ""
    thinking: str = ""
    tokens: int = 0
    spent_ms: float = 0.0
    elapsed_ms: float = 0.0
    cuts: int = 0
    first_frame: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class ContinuationCall:
    """What to send for the rest of an answer, and the form that reads what comes of it: it translates each frame to
    one of the client's own stream."""

    call: HttpCall
    form: StreamFormat


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A chat as the model reads it, up to the answer. ``closes_turn``: the model's template ends a last message of the
    assistant, so that only the prompt with the text after it is continued."""

    text: str
    closes_turn: bool


class StreamFormat(Protocol):
    """``frame_end_pattern`` ends a frame, ``frame_separator`` is its most common spelling. ``supports_continuation``:
    an answer of this form can be continued, so its text is worth keeping."""

    frame_separator: bytes
    frame_end_pattern: re.Pattern[bytes]
    supports_continuation: bool

    def find_marks(self, frames: bytes) -> object | None:
        """A mark of anything but text; ``None`` where these frames hold text only, so that none need be read. Cheap:
        each streamed token passes here."""

    def find_last_frame_end(self, frames: bytearray, start: int) -> int:
        """Where the last frame that ends at or after ``start`` ends; 0 if none does."""

    def read(self, frame: bytes) -> Frame: ...

    def extract_texts(self, frames: bytes) -> TextPieces:
        """The texts of many frames that hold text only: what ``read`` returns for each, for a tenth of the cost."""

    def continuation_refusal(self, request: JsonObject) -> str | None:
        """Why an answer to this request cannot be continued rightly; ``None`` if it can."""

    def budget(self, request: JsonObject) -> int | None:
        """How many tokens the client allows at most."""

    def uses_template(self, request: JsonObject) -> bool:
        """Whether the model's template stands between this request and what the model reads."""

    def render_call(self, request: JsonObject, thinking: str) -> HttpCall | None:
        """Asks the server to render the prompt up to the answer; ``None`` where its answer would be of no use."""

    def raw_prompt_refusal(self, request: JsonObject) -> str | None:
        """Why ``continue_raw_prompt`` cannot do it rightly; ``None`` if it can."""

    def continue_raw_prompt(self, request: JsonObject, partial_answer: PartialAnswer, prompt: str) -> ContinuationCall:
        """As text after the rendered prompt: for templates that close a message of the assistant."""

    def read_rendered_prompt(self, document: JsonObject) -> RenderedPrompt | None:
        """The prompt in the answer to ``render_call``; ``None`` where it holds none."""

    def assistant_message_refusal(self, request: JsonObject) -> str | None:
        """Why ``continue_assistant_message`` cannot do it rightly; ``None`` if it can."""

    def continue_assistant_message(self, request: JsonObject, partial_answer: PartialAnswer) -> ContinuationCall:
        """As a last message of the assistant."""

    def translate(self, frame: Frame, partial_answer: PartialAnswer) -> bytes:
        """A frame of a later attempt as a frame of the client's own stream, with corrected figures; may be empty."""

    def closing_frames(self, reason: str, partial_answer: PartialAnswer) -> bytes:
        """What is missing for an answer whose text is complete."""

    def error_frame(self, message: str) -> bytes: ...


def read_debug_rendering(document: JsonObject) -> RenderedPrompt | None:
    """Ollama's answer to a chat with SENTINEL as the answer so far and ``_debug_render_only``."""
    info = document.get("_debug_info")
    prompt = safe_json.as_text(info.get("rendered_template")) if isinstance(info, dict) else None
    if prompt is None or prompt.count(SENTINEL) != 1:
        return None
    before, _, after = prompt.partition(SENTINEL)
    return RenderedPrompt(before, closes_turn=bool(after.strip()))


def append_answer(messages: list[Any], text: str, thinking_key: str, thinking: str) -> list[Any]:
    """The messages with the answer so far as the last: joined to the client's own, if it began the answer itself."""
    if client_began_answer(messages):
        last = messages[-1]
        return [*messages[:-1], {**last, "content": last["content"] + text}]
    message = {"role": "assistant", "content": text}
    return [*messages, message | {thinking_key: thinking} if thinking else message]


def client_began_answer(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "assistant" and isinstance(last.get("content"), str)


def find_strings(pattern: re.Pattern[bytes], frames: bytes) -> TextPieces | None:
    """Every JSON string that the pattern finds, without taking the frames apart: a quotation mark inside of a string is
    escaped, so that a key is found nowhere but where it is one. ``None`` where that gives no strings."""
    found = safe_json.parse(b"[" + b",".join(pattern.findall(frames)) + b"]")
    return TextPieces(tuple(filter(None, found))) if isinstance(found, list) else None


def collect_texts(pairs: Iterable[tuple[str, str]]) -> TextPieces:
    """From the text and the thinking of each frame."""
    all_pairs = list(pairs)
    texts = tuple(text for text, _ in all_pairs if text)
    return TextPieces(texts, tuple(thinking for _, thinking in all_pairs if thinking))


def continuation_note(partial_answer: PartialAnswer) -> dict[str, int]:
    """What the last frame reports of the continuations."""
    return {"continued": partial_answer.cuts, "tokens_before": partial_answer.tokens}


def positive_count(value: Any) -> int | None:
    return safe_json.as_count(value) or None
