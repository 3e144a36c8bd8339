"""The format of Ollama's own streams, ``/api/chat`` and ``/api/generate``: to read, continue and end them. Pure."""

from __future__ import annotations

import re
from typing import Any

from gpumesh.backends import error_text, safe_json
from gpumesh.backends.base import JSON_HEADERS, HttpCall
from gpumesh.backends.continuation.stream_format import (
    SENTINEL,
    ContinuationCall,
    Frame,
    JsonObject,
    PartialAnswer,
    RenderedPrompt,
    TextPieces,
    append_answer,
    client_began_answer,
    collect_texts,
    continuation_note,
    find_strings,
    positive_count,
    read_debug_rendering,
)
from gpumesh.backends.frames import find_last_line_end

# All alternatives begin with one quotation mark outside of the group: so the search is for a single byte, which is
# fast.
_MARKS = re.compile(rb'"(?:done"\s*:\s*true|error"|tool_calls")')
_TEXTS = re.compile(rb'"(?:content|response)"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")')


class OllamaStreamFormat:
    """``/api/generate`` if ``generate``, otherwise ``/api/chat``."""

    frame_separator = b"\n"
    frame_end_pattern = re.compile(rb"\n[\r\n]*")
    find_last_frame_end = staticmethod(find_last_line_end)
    find_marks = staticmethod(_MARKS.search)
    supports_continuation = True

    def __init__(self, *, generate: bool) -> None:
        self._generate = generate

    def read(self, frame: bytes) -> Frame:
        if not frame.strip():
            return Frame()
        document = safe_json.parse_object(frame)
        if document is None:
            return Frame(error="a line that is no JSON")
        text, thinking, source = _read_texts(document)
        done = document.get("done") is True
        return Frame(
            document,
            text=text,
            thinking=thinking,
            calls_tools=bool(source.get("tool_calls")),
            text_complete=done,
            ends_stream=done,
            error=error_text.find_error_message(document),
        )

    def extract_texts(self, frames: bytes) -> TextPieces:
        if b'"thinking"' not in frames and (pieces := find_strings(_TEXTS, frames)) is not None:
            return pieces
        lines = [line for line in frames.split(b"\n") if line.strip()]
        return collect_texts(_read_texts(document)[:2] for document in safe_json.parse_objects(lines))

    def continuation_refusal(self, request: JsonObject) -> str | None:
        for key in ("tools", "format", "suffix", "context", "template", "logprobs"):
            if request.get(key):
                return f"an answer with `{key}` cannot be continued"
        if self._generate:
            if not isinstance(request.get("prompt"), str) or (request.get("raw") and request.get("images")):
                return "an answer to this kind of prompt cannot be continued"
        elif not isinstance(request.get("messages"), list):
            return "an answer to this kind of prompt cannot be continued"
        return None

    def budget(self, request: JsonObject) -> int | None:
        return positive_count(_options(request).get("num_predict"))

    def uses_template(self, request: JsonObject) -> bool:
        return not (self._generate and request.get("raw"))

    def render_call(self, request: JsonObject, thinking: str) -> HttpCall | None:
        # Images do not change how the template treats the turn, so they are left out: the question stays small.
        body = self._as_chat(_without_images(request), SENTINEL, thinking)
        body |= {"_debug_render_only": True, "stream": False}
        # A server that does not know `_debug_render_only` generates an answer: one token costs little.
        return _chat_call(body, _options(request) | {"num_predict": 1})

    def raw_prompt_refusal(self, request: JsonObject) -> str | None:
        if _has_images(request):
            return "its template closes the turn, and images cannot be told as text"
        if not self._generate and client_began_answer(request.get("messages")):
            return "its template closes the turn that the client began"
        return None

    def continue_raw_prompt(self, request: JsonObject, partial_answer: PartialAnswer, prompt: str) -> ContinuationCall:
        body = {key: request[key] for key in ("model", "keep_alive") if key in request}
        return ContinuationCall(
            raw_prompt_call(body, prompt + partial_answer.text, self._remaining_options(request, partial_answer)), self
        )

    def read_rendered_prompt(self, document: JsonObject) -> RenderedPrompt | None:
        return read_debug_rendering(document)

    def assistant_message_refusal(self, request: JsonObject) -> str | None:  # noqa: ARG002
        return None

    def continue_assistant_message(self, request: JsonObject, partial_answer: PartialAnswer) -> ContinuationCall:
        options = self._remaining_options(request, partial_answer)
        if not self.uses_template(request):
            body = {key: value for key, value in request.items() if key != "options"}
            return ContinuationCall(
                raw_prompt_call(body, str(request.get("prompt")) + partial_answer.text, options), self
            )
        return ContinuationCall(
            _chat_call(self._as_chat(request, partial_answer.text, partial_answer.thinking), options), self
        )

    def _remaining_options(self, request: JsonObject, partial_answer: PartialAnswer) -> dict[str, Any]:
        """The request's options, with the part of its token limit that is left."""
        budget, options = self.budget(request), _options(request)
        return options if budget is None else options | {"num_predict": budget - partial_answer.tokens}

    def _as_chat(self, request: JsonObject, text: str, thinking: str) -> dict[str, Any]:
        """A chat whose last message is the partial answer. A prompt of ``/api/generate`` becomes the messages that
        Ollama's own handler makes of it."""
        body = {key: value for key, value in request.items() if key not in ("prompt", "system", "images", "raw")}
        if not self._generate:
            messages = list(request["messages"])
        else:
            system = request.get("system")
            messages = [{"role": "system", "content": system}] if system else []
            user: dict[str, Any] = {"role": "user", "content": request["prompt"]}
            if request.get("images"):
                user["images"] = request["images"]
            messages.append(user)
        body["messages"] = append_answer(messages, text, "thinking", thinking)
        return body

    def translate(self, frame: Frame, partial_answer: PartialAnswer) -> bytes:
        if frame.document is None:
            return b""
        members = {key: value for key, value in frame.document.items() if key not in ("message", "response", "context")}
        out: dict[str, Any] = {key: members.pop(key) for key in ("model", "created_at") if key in members}
        if partial_answer.first_frame is not None and "model" in partial_answer.first_frame:
            out["model"] = partial_answer.first_frame["model"]
        piece: dict[str, Any] = {"response": frame.text} if self._generate else {"content": frame.text}
        if frame.thinking:
            piece["thinking"] = frame.thinking
        out |= piece if self._generate else {"message": {"role": "assistant", **piece}}
        out |= members
        if frame.ends_stream:
            out |= _correct_figures(members, partial_answer)
        return safe_json.dump_compact(out) + b"\n"

    def closing_frames(self, reason: str, partial_answer: PartialAnswer) -> bytes:
        document = {"done": True, "done_reason": reason, "eval_count": 0}
        if partial_answer.first_frame is not None:
            document |= {
                key: partial_answer.first_frame[key]
                for key in ("model", "created_at")
                if key in partial_answer.first_frame
            }
        return self.translate(Frame(document, ends_stream=True), partial_answer)

    def error_frame(self, message: str) -> bytes:
        return safe_json.dump_compact({"error": message}) + b"\n"


def raw_prompt_call(body: dict[str, Any], prompt: str, options: dict[str, Any]) -> HttpCall:
    """The request to continue this prompt without a template."""
    raw_body = body | {"prompt": prompt, "raw": True, "stream": True}
    return HttpCall(
        "POST",
        "/api/generate",
        safe_json.dump_compact(raw_body | {"options": options} if options else raw_body),
        JSON_HEADERS,
    )


def _read_texts(document: JsonObject) -> tuple[str, str, JsonObject]:
    """In this order: the text, the thinking, and the object that holds the two texts."""
    message = document.get("message")
    if isinstance(message, dict):
        return (
            safe_json.as_text(message.get("content")) or "",
            safe_json.as_text(message.get("thinking")) or "",
            message,
        )
    return (
        safe_json.as_text(document.get("response")) or "",
        safe_json.as_text(document.get("thinking")) or "",
        document,
    )


def _chat_call(body: dict[str, Any], options: dict[str, Any]) -> HttpCall:
    if options:
        body["options"] = options
    return HttpCall("POST", "/api/chat", safe_json.dump_compact(body), JSON_HEADERS)


def _options(request: JsonObject) -> dict[str, Any]:
    options = request.get("options")
    return dict(options) if isinstance(options, dict) else {}


def _has_images(request: JsonObject) -> bool:
    return bool(request.get("images")) or any(message.get("images") for message in _messages(request))


def _without_images(request: JsonObject) -> JsonObject:
    if not _has_images(request):
        return request
    text_request = {key: value for key, value in request.items() if key != "images"}
    if "messages" in text_request:
        text_request["messages"] = [
            {key: value for key, value in message.items() if key != "images"} for message in _messages(request)
        ]
    return text_request


def _messages(request: JsonObject) -> tuple[dict[str, Any], ...]:
    return safe_json.as_objects(request.get("messages"))


def _correct_figures(figures: JsonObject, partial_answer: PartialAnswer) -> dict[str, Any]:
    """The figures of the whole answer, from those of the last attempt. The last attempt counted the partial answer as a
    part of its prompt. The durations of the attempts before it are measured by our clock."""
    out: dict[str, Any] = {"eval_count": (safe_json.as_count(figures.get("eval_count")) or 0) + partial_answer.tokens}
    prompt = safe_json.as_count(figures.get("prompt_eval_count"))
    if prompt is not None:
        out["prompt_eval_count"] = max(prompt - partial_answer.tokens, 0)
    out["eval_duration"] = (safe_json.as_count(figures.get("eval_duration")) or 0) + round(
        partial_answer.spent_ms * 1e6
    )
    out["total_duration"] = max(
        round(partial_answer.elapsed_ms * 1e6), safe_json.as_count(figures.get("total_duration")) or 0
    )
    return out | {"gpumesh": continuation_note(partial_answer)}
