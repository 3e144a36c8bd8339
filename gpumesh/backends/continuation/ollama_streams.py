"""``OllamaStreamFormat``: how streams of ``/api/chat`` and ``/api/generate`` are read, continued and ended. Pure."""

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
    collect_texts,
    continuation_note,
    find_strings,
    positive_count,
    probe_messages,
    read_debug_rendering,
)
from gpumesh.backends.frames import find_last_line_end

# What makes a line more than text. The pattern begins with one quotation mark outside of the group: so the search is
# for a single byte, which is fast.
_MARKS = re.compile(rb'"(?:done"\s*:\s*true|error"|tool_calls")')
NS_PER_MS = 1e6  # Ollama gives durations in nanoseconds
_TEXTS = re.compile(rb'"(?:content|response)"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")')


class OllamaStreamFormat:
    """The streams of ``/api/generate`` if ``generate``, otherwise those of ``/api/chat``. The methods are described in
    ``StreamFormat``."""

    frame_separator = b"\n"
    frame_end_pattern = re.compile(rb"\n[\r\n]*")
    find_last_frame_end = staticmethod(find_last_line_end)
    find_marks = staticmethod(_MARKS.search)
    supports_continuation = True

    def __init__(self, *, generate: bool) -> None:
        self._generate = generate

    def read(self, frame: bytes) -> Frame:
        """Parses one line, with its text, its thinking and its tool calls."""
        if not frame.strip():
            return Frame()
        document = safe_json.parse_object(frame)
        if document is None:
            return Frame(error="a line that is no JSON")
        text, thinking, text_holder = _read_texts(document)
        done = document.get("done") is True
        has_images, calls_tools = _holds_images(text_holder), bool(text_holder.get("tool_calls"))
        return Frame(
            document,
            text=text,
            thinking=thinking,
            # ``completed``: the progress of an image that is generated.
            has_content=bool(text or thinking or calls_tools or has_images or "completed" in document),
            calls_tools=calls_tools,
            has_other_content=has_images,
            finished_choices=(0,) if done else (),
            ends_stream=done,
            error=error_text.find_error_message(document),
        )

    def extract_texts(self, frames: bytes) -> TextPieces:
        """The texts of many lines. Lines with thinking are parsed one by one."""
        if b'"thinking"' not in frames:
            pieces = find_strings(_TEXTS, frames, frames.count(b"\n"))
            if pieces is not None:
                return pieces
        lines = [line for line in frames.split(b"\n") if line.strip()]
        texts = [_read_texts(document) for document in safe_json.parse_objects(lines)]
        has_images = any(_holds_images(text_holder) for _, _, text_holder in texts)
        return collect_texts([(text, thinking) for text, thinking, _ in texts], has_other_content=has_images)

    def continuation_refusal(self, request: JsonObject) -> str | None:
        """The reason if the request holds something that a continuation could not keep: tools, a format, a suffix …"""
        for key in ("tools", "format", "suffix", "context", "template", "logprobs"):
            if request.get(key):
                return f"an answer with `{key}` cannot be continued"
        if self._generate:
            is_raw_with_images = bool(request.get("raw") and request.get("images"))
            has_known_prompt = isinstance(request.get("prompt"), str) and not is_raw_with_images
        else:
            has_known_prompt = isinstance(request.get("messages"), list)
        return None if has_known_prompt else "an answer to this kind of prompt cannot be continued"

    def token_budget(self, request: JsonObject) -> int | None:
        """The option ``num_predict``, if it is a limit."""
        return positive_count(_options(request).get("num_predict"))

    def choice_count(self, request: JsonObject) -> int:  # noqa: ARG002
        """1: this API has no choices."""
        return 1

    def uses_template(self, request: JsonObject) -> bool:
        """Whether Ollama renders the prompt with the template: it does, except for a raw prompt of
        ``/api/generate``."""
        return not (self._generate and request.get("raw"))

    def render_call(self, request: JsonObject, thinking: str) -> HttpCall | None:
        """Asks for the rendered prompt, without images."""
        # Images do not change how the template treats the turn, so they are left out: the question stays small.
        body = self._as_chat(_without_images(request), SENTINEL, thinking)
        body |= {"_debug_render_only": True, "stream": False}
        # A server that does not know `_debug_render_only` generates an answer: one token costs little.
        return _chat_call(body, _options(request) | {"num_predict": 1})

    def raw_prompt_refusal(self, request: JsonObject) -> str | None:
        """The reason if the chat holds images."""
        return "images cannot be told as text" if _has_images(request) else None

    def continue_raw_prompt(self, request: JsonObject, partial_answer: PartialAnswer, prompt: str) -> ContinuationCall:
        """A request to ``/api/generate`` for a raw prompt: the rendered prompt and the partial answer."""
        body = {key: request[key] for key in ("model", "keep_alive") if key in request}
        options = self._remaining_options(request, partial_answer)
        return ContinuationCall(raw_prompt_call(body, prompt + partial_answer.text, options), self)

    def read_rendered_prompt(self, document: JsonObject) -> RenderedPrompt | None:
        """The prompt in the answer to ``render_call``."""
        return read_debug_rendering(document)

    def prefill_calls(self, request: JsonObject) -> tuple[HttpCall, ...]:
        """One chat. It has the options of the request: others might make the server load the model once more."""
        body = {key: request[key] for key in ("model", "keep_alive", "think") if key in request}
        body |= {"messages": probe_messages(), "stream": True}
        return (_chat_call(body, _options(request) | {"num_predict": 1}),)

    def assistant_message_refusal(self, request: JsonObject) -> str | None:  # noqa: ARG002
        """``None``: a last message of the assistant can always be added."""
        return None

    def continue_assistant_message(self, request: JsonObject, partial_answer: PartialAnswer) -> ContinuationCall:
        """A chat whose last message is the partial answer. A raw prompt stays raw: the partial answer follows it."""
        options = self._remaining_options(request, partial_answer)
        if not self.uses_template(request):
            body = {key: value for key, value in request.items() if key != "options"}
            prompt = str(request.get("prompt")) + partial_answer.text
            return ContinuationCall(raw_prompt_call(body, prompt, options), self)
        chat = self._as_chat(request, partial_answer.text, partial_answer.thinking)
        return ContinuationCall(_chat_call(chat, options), self)

    def _remaining_options(self, request: JsonObject, partial_answer: PartialAnswer) -> dict[str, Any]:
        """The request's options, with a token limit that is smaller by the tokens of the partial answer."""
        budget, options = self.token_budget(request), _options(request)
        return options if budget is None else options | {"num_predict": budget - partial_answer.tokens}

    def _as_chat(self, request: JsonObject, text: str, thinking: str) -> dict[str, Any]:
        """A chat whose last message is the partial answer. A prompt of ``/api/generate`` becomes the messages that
        Ollama's own handler makes of such a prompt."""
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
        """The same line in the form of the client's route. The last line gets the figures of the whole answer."""
        if frame.document is None:
            return b""
        # The members in the order in which Ollama sends them: model, created_at, the text, the others.
        others = {key: value for key, value in frame.document.items() if key not in ("message", "response", "context")}
        translated: dict[str, Any] = {key: others.pop(key) for key in ("model", "created_at") if key in others}
        if partial_answer.first_frame is not None and "model" in partial_answer.first_frame:
            translated["model"] = partial_answer.first_frame["model"]
        texts: dict[str, Any] = {"response": frame.text} if self._generate else {"content": frame.text}
        if frame.thinking:
            texts["thinking"] = frame.thinking
        translated |= texts if self._generate else {"message": {"role": "assistant", **texts}}
        translated |= others
        if frame.ends_stream:
            translated |= _correct_figures(others, partial_answer)
        return safe_json.dump_compact(translated) + b"\n"

    def closing_frames(self, reason: str, partial_answer: PartialAnswer) -> bytes:
        """A last line with the finish reason and the figures."""
        document = {"done": True, "done_reason": reason, "eval_count": 0}
        if partial_answer.first_frame is not None:
            first_frame = partial_answer.first_frame
            document |= {key: first_frame[key] for key in ("model", "created_at") if key in first_frame}
        return self.translate(Frame(document, ends_stream=True), partial_answer)

    def error_frame(self, message: str) -> bytes:
        """A line with the error message."""
        return safe_json.dump_compact({"error": message}) + b"\n"


def raw_prompt_call(body: dict[str, Any], prompt: str, options: dict[str, Any]) -> HttpCall:
    """The request that lets the model continue this prompt, without a template. ``body`` holds the other members."""
    raw_body = body | {"prompt": prompt, "raw": True, "stream": True}
    if options:
        raw_body["options"] = options
    return HttpCall("POST", "/api/generate", safe_json.dump_compact(raw_body), JSON_HEADERS)


def _read_texts(document: JsonObject) -> tuple[str, str, JsonObject]:
    """Returns the text, the thinking, and the object that holds the two texts, in this order."""
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


def _holds_images(text_holder: JsonObject) -> bool:
    """Whether a line holds generated images."""
    return bool(text_holder.get("images") or text_holder.get("image"))


def _chat_call(body: dict[str, Any], options: dict[str, Any]) -> HttpCall:
    """The request to ``/api/chat`` with this body, to which the options are added."""
    if options:
        body["options"] = options
    return HttpCall("POST", "/api/chat", safe_json.dump_compact(body), JSON_HEADERS)


def _options(request: JsonObject) -> dict[str, Any]:
    """A copy of the request's options; empty if it has none."""
    options = request.get("options")
    return dict(options) if isinstance(options, dict) else {}


def _has_images(request: JsonObject) -> bool:
    """Whether the request or one of its messages holds images."""
    return bool(request.get("images")) or any(message.get("images") for message in _messages(request))


def _without_images(request: JsonObject) -> JsonObject:
    """The request without its images, and without those of its messages."""
    if not _has_images(request):
        return request
    text_request = {key: value for key, value in request.items() if key != "images"}
    if "messages" in text_request:
        text_request["messages"] = [
            {key: value for key, value in message.items() if key != "images"} for message in _messages(request)
        ]
    return text_request


def _messages(request: JsonObject) -> tuple[dict[str, Any], ...]:
    """The messages of a chat that are objects."""
    return safe_json.as_objects(request.get("messages"))


def _correct_figures(figures: JsonObject, partial_answer: PartialAnswer) -> dict[str, Any]:
    """The figures of the whole answer. ``figures`` are those of the last attempt, which counted the partial answer as a
    part of its prompt. The durations of the earlier attempts were measured by our clock."""
    corrected: dict[str, Any] = {}
    corrected["eval_count"] = (safe_json.as_count(figures.get("eval_count")) or 0) + partial_answer.tokens
    prompt_tokens = safe_json.as_count(figures.get("prompt_eval_count"))
    if prompt_tokens is not None:
        corrected["prompt_eval_count"] = max(prompt_tokens - partial_answer.tokens, 0)
    spent_ns = round(partial_answer.spent_ms * NS_PER_MS)
    corrected["eval_duration"] = (safe_json.as_count(figures.get("eval_duration")) or 0) + spent_ns
    elapsed_ns = round(partial_answer.elapsed_ms * NS_PER_MS)
    corrected["total_duration"] = max(elapsed_ns, safe_json.as_count(figures.get("total_duration")) or 0)
    return corrected | {"gpumesh": continuation_note(partial_answer)}
