"""``StreamFormat``: what ``Continuation`` must know of a stream's format to read, continue and end the stream. Pure.

What a server does with a last message of the assistant differs by server, by model and by template: it continues the
message, repeats it first, or closes it and begins a new one. So this is never assumed. A server that renders the prompt
gets the prompt with the partial answer after it, as raw text. Any other server is first asked how it treats such a
message (``prefill.py``). The source of this is docs/internals/ollama.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gpumesh.backends import safe_json
from gpumesh.backends.base import HttpCall

JsonObject = Mapping[str, Any]
# Stands for the answer's text when a server is asked how it continues a text. No model generates this text.
SENTINEL = "gpumesh8f1d2c7e5b3a9046"
_OPEN_THINKING = re.compile(r"<[a-z_:|]{0,20}think(?:ing)?[a-z_:|]{0,20}>\s*\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a stream. ``document`` is its JSON object; ``None`` if it holds none (a comment, for example).

    ``has_content``: it holds a part of an answer (text, thinking, a tool call …), and not only a comment, a role or
    figures. ``text`` and ``thinking`` are those of the first choice. ``calls_tools``: it holds a call of a tool.
    ``has_other_content``: its content is nothing of this (a picture, a list of parts …), so no other server can
    continue it. ``choices`` are the indexes of the choices that it holds, ``finished_choices`` of those that end with
    it, ``unmarked_choices`` of those whose reason for the end is an empty text: some servers send this in each frame.
    ``ends_stream``: no frame follows. ``error``: the server's error, or why the frame is not valid; ``None`` for a
    frame without an error."""

    document: JsonObject | None = None
    text: str = ""
    thinking: str = ""
    has_content: bool = False
    calls_tools: bool = False
    has_other_content: bool = False
    choices: tuple[int, ...] = ()
    finished_choices: tuple[int, ...] = ()
    unmarked_choices: tuple[int, ...] = ()
    ends_stream: bool = False
    error: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the frame says nothing, such as a comment that keeps a connection open."""
        return self.document is None and not self.ends_stream and self.error is None

    @property
    def text_complete(self) -> bool:
        """Whether a choice ends with this frame."""
        return bool(self.finished_choices)


@dataclass(frozen=True, slots=True)
class TextPieces:
    """The pieces of text and of thinking, in order, without empty pieces. ``has_other_content``: a frame holds other
    content (``Frame.has_other_content``)."""

    texts: tuple[str, ...] = ()
    thinking_texts: tuple[str, ...] = ()
    has_other_content: bool = False


@dataclass(frozen=True, slots=True)
class PartialAnswer:
    """The part of the answer that the client has received, over all attempts.

    ``tokens`` counts its frames with text, about as many tokens, or is the servers' own count if that is higher.
    ``spent_ms``: the time in which the servers generated this part. ``elapsed_ms``: the time since the request began.
    ``cuts``: how often the answer was cut. ``first_frame`` is the first document of the stream, which names the answer;
    ``None`` if no document has come.
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
    its frames into a frame of the client's own stream. ``repeated_text``: the server sends this text once more before
    the new text."""

    call: HttpCall
    stream_format: StreamFormat
    repeated_text: str = ""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A chat as the model reads it, up to the answer. ``closes_turn``: the model's template closes a last message of
    the assistant, so the partial answer can only be sent as text after this prompt."""

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

    def choice_count(self, request: JsonObject) -> int:
        """How many choices an answer to this request has."""

    def uses_template(self, request: JsonObject) -> bool:
        """Whether the server applies the model's template to this request."""

    def render_call(self, request: JsonObject, thinking: str) -> HttpCall | None:
        """The request that asks the server to render the prompt up to the answer. ``None`` if this would not help."""

    def read_rendered_prompt(self, document: JsonObject) -> RenderedPrompt | None:
        """The prompt in the answer to ``render_call``; ``None`` if the answer holds none, or if a text after the prompt
        would not be the answer."""

    def raw_prompt_refusal(self, request: JsonObject) -> str | None:
        """Why the rendered prompt of this request is not all that the model reads; ``None`` if it is."""

    def continue_raw_prompt(self, request: JsonObject, partial_answer: PartialAnswer, prompt: str) -> ContinuationCall:
        """Makes the request that sends the partial answer as text after the rendered prompt."""

    def prefill_calls(self, request: JsonObject) -> tuple[HttpCall, ...]:
        """The requests that show how the server treats a last message of the assistant, as ``judge_prefill`` in
        ``prefill.py`` reads their answers. Each generates one token of another answer, as a stream."""

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


def opens_thinking(prompt: str) -> bool:
    """Whether the prompt ends with an open mark of thinking: text after it would be thinking, not the answer."""
    return _OPEN_THINKING.search(prompt) is not None


def read_debug_rendering(document: JsonObject) -> RenderedPrompt | None:
    """Reads Ollama's answer to a chat with ``_debug_render_only`` and SENTINEL as the partial answer. ``None`` if the
    answer holds no prompt, if the prompt does not have the sentinel exactly once, or if it ends in open thinking."""
    info = document.get("_debug_info")
    prompt = safe_json.as_text(info.get("rendered_template")) if isinstance(info, dict) else None
    if prompt is None or prompt.count(SENTINEL) != 1:
        return None
    before, _, after = prompt.partition(SENTINEL)
    if opens_thinking(before):
        return None
    return RenderedPrompt(before, closes_turn=bool(after.strip()))  # text after the partial answer closes the turn


def append_answer(messages: list[Any], text: str, thinking_key: str, thinking: str) -> list[Any]:
    """The messages with the partial answer as the last message. If the client began the answer itself, the partial
    answer is joined to the client's message. ``thinking_key`` is the member of a message that holds its thinking."""
    if client_began_answer(messages):
        last = messages[-1]
        return [*messages[:-1], {**last, "content": last["content"] + text}]
    message = {"role": "assistant", "content": text}
    return [*messages, message | {thinking_key: thinking} if thinking else message]


def fold_messages(request: JsonObject) -> JsonObject:
    """The request with its messages as Ollama reads them: the names of their members and their roles without case."""
    messages = request.get("messages")
    if not isinstance(messages, list):
        return request
    return {**request, "messages": [_fold_message(message) for message in messages]}


def _fold_message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    folded = {name.lower(): value for name, value in message.items()}
    role = folded.get("role")
    return {**folded, "role": role.lower()} if isinstance(role, str) else folded


def client_began_answer(messages: Any) -> bool:
    """Whether the last message is a text of the assistant: the client began the answer, and the model continues it."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict):
        return False
    return last.get("role") == "assistant" and isinstance(last.get("content"), str)


def find_strings(pattern: re.Pattern[bytes], frames: bytes, count: int = 0) -> TextPieces | None:
    """The JSON strings that the pattern finds, without parsing the frames. ``None`` if they are not valid JSON, or if
    there are fewer than ``count``, the number of frames: then a frame may hold something else.

    The pattern begins with a key in quotation marks. A quotation mark inside of a string is escaped, so the pattern
    cannot match inside of a text.
    """
    matches = pattern.findall(frames)
    strings = safe_json.parse(b"[" + b",".join(matches) + b"]") if len(matches) >= count else None
    if not isinstance(strings, list):
        return None
    return TextPieces(tuple(filter(None, strings)))  # without empty strings


def collect_texts(pairs: Iterable[tuple[str, str]], *, has_other_content: bool = False) -> TextPieces:
    """The texts and the thinking of many frames, without empty pieces. ``pairs`` holds both of each frame."""
    all_pairs = list(pairs)
    texts = tuple(text for text, _ in all_pairs if text)
    thinking_texts = tuple(thinking for _, thinking in all_pairs if thinking)
    return TextPieces(texts, thinking_texts, has_other_content)


def continuation_note(partial_answer: PartialAnswer) -> dict[str, int]:
    """The member ``gpumesh`` of the last frame: it reports the continuations."""
    return {"continued": partial_answer.cuts, "tokens_before": partial_answer.tokens}


def probe_messages() -> list[JsonObject]:
    """A short chat whose last message is SENTINEL, as if the assistant had written it."""
    return [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": SENTINEL}]


def positive_count(value: Any) -> int | None:
    """The value if it is a count of at least 1; ``None`` for anything else."""
    return safe_json.as_count(value) or None
