"""``EventStreamFormat``: the streams of ``/v1`` as server-sent events. They are passed on, but not continued. Pure.

``CompletionStreamFormat`` is the format of ``/v1/completions``, whose answers may have several choices.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from gpumesh.backends import error_text, safe_json
from gpumesh.backends.base import JSON_HEADERS, HttpCall
from gpumesh.backends.continuation.stream_format import (
    ContinuationCall,
    Frame,
    JsonObject,
    PartialAnswer,
    RenderedPrompt,
    TextPieces,
    read_debug_rendering,
)
from gpumesh.backends.frames import MAX_EVENT_LINES, find_last_event_end, read_event_line

# What makes an event more than text; one with a whole ``message`` is no event as clients expect it. The patterns begin
# with one quotation mark outside of the group: so the search is for a single byte, which is fast. No alternative begins
# with a group, which would make each search slower by a third.
_MARK = (
    rb'error"|finish_reason"\s*:\s*"|usage"\s*:\s*\{|tool_calls"|function_call"|message(?:_stop"|"\s*:\s*\{)'
    rb'|response\.(?:completed|incomplete|failed|cancelled)"'
)
_MARKS = re.compile(rb'"(?:' + _MARK + rb'|stop_reason"\s*:\s*")')
# In formats with choices, each event of a choice after the first is read: the answer is complete when all choices are.
CHOICE_MARKS = re.compile(rb'"(?:' + _MARK + rb'|index"\s*:\s*[1-9])')
_LAST_EVENTS = frozenset({"message_stop", "response.completed", "response.incomplete"})
_FAILED_EVENTS = frozenset({"response.failed", "response.cancelled"})
# Events that a server may send before it has read the prompt.
_EMPTY_EVENTS = frozenset(
    {
        "ping",
        "message_start",
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_summary_part.added",
    }
)
DONE = b"data: [DONE]\n\n"
MESSAGE_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
# Reasons for the end that tell of a failure: of vLLM and SGLang (a server that stops, or a lost engine), TensorRT-LLM,
# and routers.
FAILED_REASONS = frozenset({"abort", "aborted", "error", "cancelled", "timeout"})


class EventStreamFormat:
    """A stream that is passed on, but never continued. After a cut it ends with an error in the form of its own API.
    Its methods are described in ``StreamFormat``."""

    frame_separator = b"\n\n"
    # The pattern begins with a fixed byte, which is found fast. A \r before this byte belongs to the line.
    frame_end_pattern = re.compile(rb"\n\r?\n[\r\n]*")
    find_last_frame_end = staticmethod(find_last_event_end)
    supports_continuation = False
    _search_marks = staticmethod(_MARKS.search)

    def __init__(self, path: str) -> None:
        self._path = path

    def find_marks(self, frames: bytes) -> object | None:
        """Looks for an error, a comment, the end of the stream, figures or a tool call; ``None`` if there is none. A
        comment is only looked for in front: while a server sends text, its comments need not be noticed."""
        has_other_line = frames.startswith((b"error:", b":")) or b"\nerror:" in frames
        # Most frames end as JSON, and then "[DONE]" need not be searched for, which would cost more than this test.
        ends_as_json = frames.endswith(b"}\n\n")
        if has_other_line or (not ends_as_json and b"[DONE]" in frames[-16:]):  # 16: longer than "data: [DONE]\n\n"
            return frames
        return self._search_marks(frames)

    def read(self, frame: bytes) -> Frame:
        """Parses one event. Its text is not read, but an event with a document counts as text."""
        frame = frame.strip(b"\r\n")
        if frame.count(b"\n") >= MAX_EVENT_LINES:
            return Frame(error=f"an event of more than {MAX_EVENT_LINES} lines")
        data = event_data(frame)
        if not data:
            return Frame()
        if data == b"[DONE]":
            return Frame(ends_stream=True)
        document = safe_json.parse_object(data)
        if document is None:
            return Frame(error="an event that is no JSON")
        event_type = document.get("type")
        is_last = event_type in _LAST_EVENTS or event_type in _FAILED_EVENTS
        return Frame(
            document,
            text=" ",  # the text is not needed, but it must not be empty: frames with text are counted as tokens
            has_content=_has_content(document, event_type),
            finished_choices=(0,) if is_last or _has_stop_reason(document, event_type) else (),
            ends_stream=is_last,
            error=_find_event_error(document, event_type),
        )

    def extract_texts(self, frames: bytes) -> TextPieces:  # noqa: ARG002 - only a continuation would need the texts
        """No texts: they are needed only to continue an answer."""
        return TextPieces()

    def continuation_refusal(self, request: JsonObject) -> str | None:  # noqa: ARG002
        """The reason why no answer of this route is continued."""
        return f"an answer of {self._path.partition('?')[0]} cannot be continued"

    def token_budget(self, request: JsonObject) -> int | None:  # noqa: ARG002
        """No limit, because it is needed only to continue an answer."""
        return None

    def choice_count(self, request: JsonObject) -> int:  # noqa: ARG002
        """1: the whole response, or the whole message."""
        return 1

    def uses_template(self, request: JsonObject) -> bool:  # noqa: ARG002
        """``False``: no prompt is rendered for an answer that is not continued."""
        return False

    def render_call(self, request: JsonObject, thinking: str) -> HttpCall | None:  # noqa: ARG002
        """No request, because the answer is not continued."""
        return None

    def raw_prompt_refusal(self, request: JsonObject) -> str | None:
        """The reason why no answer of this route is continued."""
        return self.continuation_refusal(request)

    def continue_raw_prompt(self, request: JsonObject, partial_answer: PartialAnswer, prompt: str) -> ContinuationCall:  # noqa: ARG002
        """The request as it was: without a text to continue, the answer starts again."""
        return self.continue_assistant_message(request, partial_answer)

    def read_rendered_prompt(self, document: JsonObject) -> RenderedPrompt | None:
        """The prompt in an answer of Ollama."""
        return read_debug_rendering(document)

    def prefill_calls(self, request: JsonObject) -> tuple[HttpCall, ...]:  # noqa: ARG002
        """No request, because the answer is not continued."""
        return ()

    def assistant_message_refusal(self, request: JsonObject) -> str | None:
        """The reason why no answer of this route is continued."""
        return self.continuation_refusal(request)

    def continue_assistant_message(
        self,
        request: JsonObject,
        partial_answer: PartialAnswer,  # noqa: ARG002
    ) -> ContinuationCall:
        """The request as it was: without a text to continue, the answer starts again."""
        return ContinuationCall(HttpCall("POST", self._path, safe_json.dump_compact(request), JSON_HEADERS), self)

    def translate(self, frame: Frame, partial_answer: PartialAnswer) -> bytes:  # noqa: ARG002
        """The same frame, rewritten."""
        if frame.document is None:
            return DONE if frame.ends_stream else b""
        return b"data: " + safe_json.dump_compact(frame.document) + b"\n\n"

    def closing_frames(self, reason: str, partial_answer: PartialAnswer) -> bytes:  # noqa: ARG002
        """The end mark: that of Anthropic, or that of OpenAI."""
        return MESSAGE_STOP if self._path.startswith("/v1/messages") else DONE

    def error_frame(self, message: str) -> bytes:
        """An error in the form of the API of this route: Anthropic's messages, OpenAI's responses, or others of
        OpenAI."""
        if self._path.startswith("/v1/messages"):
            body: JsonObject = {"type": "error", "error": {"type": "api_error", "message": message}}
            return b"event: error\ndata: " + safe_json.dump_compact(body) + b"\n\n"
        if self._path.startswith("/v1/responses"):
            body = {"type": "error", "code": "server_error", "message": message, "param": None}
            return b"event: error\ndata: " + safe_json.dump_compact(body) + b"\n\n"
        body = {"error": {"message": message, "type": "api_error", "param": None, "code": "stream_cut"}}
        return b"data: " + safe_json.dump_compact(body) + b"\n\n"


class CompletionStreamFormat(EventStreamFormat):
    """The streams of ``/v1/completions``: each choice ends with a finish reason, and the stream with ``[DONE]``."""

    _search_marks = staticmethod(CHOICE_MARKS.search)

    def read(self, frame: bytes) -> Frame:
        """Parses one event, with the choices that it holds."""
        event = super().read(frame)
        if event.document is None:
            return event
        choices = read_choices(event.document)
        has_text = any(choice.get("text") for choice in choices)
        return with_choices(replace(event, has_content=has_text), choices)

    def choice_count(self, request: JsonObject) -> int:
        """``n`` choices for each prompt. A list of numbers is one prompt: its tokens."""
        prompts = request.get("prompt")
        is_list_of_prompts = isinstance(prompts, list) and bool(prompts) and not isinstance(prompts[0], int)
        return wanted_choices(request) * (len(prompts) if isinstance(prompts, list) and is_list_of_prompts else 1)


def read_choices(document: JsonObject) -> tuple[JsonObject, ...]:
    """The choices in a frame of OpenAI's kind."""
    return safe_json.as_objects(document.get("choices"))


def with_choices(frame: Frame, choices: tuple[JsonObject, ...]) -> Frame:
    """The frame with the indexes of its choices, and of those that have a finish reason. A reason that tells a failure
    becomes the frame's error."""
    indexes = [safe_json.as_count(choice.get("index")) or 0 for choice in choices]
    reasons = [choice.get("finish_reason") for choice in choices]
    if not any(isinstance(reason, str) for reason in reasons):  # nearly every frame
        return replace(frame, choices=tuple(indexes))
    failed = next((reason for reason in reasons if reason in FAILED_REASONS), None)
    return replace(
        frame,
        choices=tuple(indexes),
        finished_choices=tuple(index for index, reason in zip(indexes, reasons, strict=True) if reason),
        unmarked_choices=tuple(index for index, reason in zip(indexes, reasons, strict=True) if reason == ""),
        error=frame.error if failed is None else failed_reason_message(failed),
    )


def failed_reason_message(reason: str) -> str:
    """The error for an answer that ends with a reason of FAILED_REASONS."""
    return f"the server gave it up (finish_reason {reason!r})"


def wanted_choices(request: JsonObject) -> int:
    """How many choices the client wants for each prompt."""
    return safe_json.as_count(request.get("n")) or 1


def _find_event_error(document: dict[str, Any], event_type: Any) -> str | None:
    """The error that an event reports; ``None`` if it reports none. Events of the responses and the messages API have a
    type. OpenAI's event ``error`` is flat, Anthropic's has a member ``error``."""
    if event_type is None:
        return error_text.find_error_message(document)
    if event_type == "error":
        return error_text.find_error_message(document) or error_text.describe_error(document)
    if event_type in _FAILED_EVENTS:
        response = document.get("response")
        error = response.get("error") if isinstance(response, dict) else None
        return error_text.describe_error(error) if error else f"the server sent {event_type}"
    return None


def _has_stop_reason(document: JsonObject, event_type: Any) -> bool:
    """Whether the event says why Anthropic's message ends: only the end mark follows."""
    delta = document.get("delta") if event_type == "message_delta" else None
    return isinstance(delta, dict) and isinstance(delta.get("stop_reason"), str)


def _has_content(document: JsonObject, event_type: Any) -> bool:
    """Whether an event holds a part of the answer. An event of a type that is not known does."""
    if event_type == "content_block_start":  # the start of a tool call holds its name, the start of a text nothing
        block = document.get("content_block")
        return isinstance(block, dict) and block.get("type") not in ("text", "thinking")
    return event_type not in _EMPTY_EVENTS


def event_data(frame: bytes) -> bytes:
    """The data of one server-sent event. An ``error:`` line is read as ``read_event_line`` describes."""
    data_of_lines = [read_event_line(line.rstrip(b"\r")) for line in frame.split(b"\n")]
    return b"\n".join([data for data in data_of_lines if data is not None]).strip()


def encode_event(document: JsonObject) -> bytes:
    """The document as one server-sent event."""
    return b"data: " + safe_json.dump_compact(document) + b"\n\n"
