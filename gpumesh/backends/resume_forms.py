"""How each route's stream is read, continued and ended: what ``continuation.Continuation`` knows of dialects. Pure.

From the source of Ollama and llama-server (shared facts: ollama-api.md, "Continuing a cut answer"): most templates
continue a last message of the assistant, so that the reply holds only the new text; those that close the turn are
continued as raw text after the prompt as the server itself renders it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from gpumesh.backends import jsons, words
from gpumesh.backends.base import HttpCall
from gpumesh.backends.ollama import JSON

Document = Mapping[str, Any]
# Stands for the text so far when a server is asked to render a prompt; no model says it.
SENTINEL = "gpumesh8f1d2c7e5b3a9046"


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a stream. ``complete``: the text ends with it; ``last``: nothing comes after it."""

    document: Document | None = None
    text: str = ""
    thinking: str = ""
    tools: bool = False
    complete: bool = False
    last: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Sofar:
    """What the client has got, over all attempts. ``spent_ms``: time spent generating what was cut; ``elapsed_ms``:
    since the request began; ``head``: the first frame, which names the answer."""

    text: str = ""
    thinking: str = ""
    tokens: int = 0
    spent_ms: float = 0.0
    elapsed_ms: float = 0.0
    cuts: int = 0
    head: Document | None = None


class Form(Protocol):
    """``marks``: a frame without any of them is an ordinary piece of text and need not be looked at in detail."""

    end: re.Pattern[bytes]
    marks: re.Pattern[bytes]

    def read(self, frame: bytes) -> Frame: ...

    def refusal(self, request: Document) -> str | None:
        """Why an answer to this request cannot be continued rightly; ``None`` if it can."""

    def budget(self, request: Document) -> int | None:
        """How many tokens the client allows at most."""

    def call(self, request: Document, sofar: Sofar, prompt: str | None) -> HttpCall:
        """What to send for the rest of the answer. ``prompt``: the rendered prompt, if the template closes turns."""

    def render_call(self, request: Document) -> HttpCall | None:
        """Asks the server to render the prompt up to SENTINEL; ``None`` where servers cannot."""

    def translate(self, frame: Frame, sofar: Sofar) -> bytes:
        """A frame of a later attempt as one of the client's own stream, figures corrected; may be empty."""

    def close(self, reason: str, sofar: Sofar) -> bytes:
        """What is missing for an answer whose text is complete."""

    def error(self, message: str) -> bytes: ...


class Native:
    """``/api/chat``, and ``/api/generate`` when ``generate``."""

    end = re.compile(rb"\n")
    marks = re.compile(rb'"done"\s*:\s*true|"error"|"tool_calls"')

    def __init__(self, *, generate: bool) -> None:
        self._generate = generate

    def read(self, frame: bytes) -> Frame:
        if not frame.strip():
            return Frame()
        document = jsons.parse_object(frame)
        if document is None:
            return Frame(error="a line that is no JSON")
        error = words.error_in(document)
        message = document.get("message")
        source = message if isinstance(message, dict) else document
        done = document.get("done") is True
        return Frame(
            document,
            text=jsons.text(source.get("content" if source is message else "response")) or "",
            thinking=jsons.text(source.get("thinking")) or "",
            tools=bool(source.get("tool_calls")),
            complete=done,
            last=done,
            error=error,
        )

    def refusal(self, request: Document) -> str | None:
        for key in ("tools", "format", "suffix", "context", "template", "logprobs"):
            if request.get(key):
                return f"an answer with `{key}` cannot be continued"
        if self._generate:
            if not isinstance(request.get("prompt"), str) or (request.get("raw") and request.get("images")):
                return "an answer to this kind of prompt cannot be continued"
        elif not isinstance(request.get("messages"), list):
            return "an answer to this kind of prompt cannot be continued"
        return None

    def budget(self, request: Document) -> int | None:
        return _positive(_options(request).get("num_predict"))

    def call(self, request: Document, sofar: Sofar, prompt: str | None) -> HttpCall:
        budget = self.budget(request)
        options = _options(request)
        if budget is not None:
            options["num_predict"] = budget - sofar.tokens
        if self._generate and request.get("raw"):
            body = {**request, "prompt": str(request.get("prompt")) + sofar.text}
        elif prompt is not None:
            body = {key: request[key] for key in ("model", "keep_alive") if key in request}
            body |= {"prompt": prompt + sofar.text, "raw": True, "stream": True}
        else:
            return _chat(self._as_chat(request, sofar.text, sofar.thinking), options)
        if options:
            body["options"] = options
        return HttpCall("POST", "/api/generate", jsons.compact(body), JSON)

    def render_call(self, request: Document) -> HttpCall | None:
        if (self._generate and request.get("raw")) or _images(request):
            return None
        body = self._as_chat(request, SENTINEL, "") | {"_debug_render_only": True, "stream": False}
        # A server that does not know the word generates: one token costs little.
        return _chat(body, _options(request) | {"num_predict": 1})

    def _as_chat(self, request: Document, text: str, thinking: str) -> dict[str, Any]:
        """A chat whose last message is the answer so far. A generate's prompt is one to the server as well: its
        handler makes the same messages of it."""
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
        body["messages"] = with_answer(messages, text, "thinking", thinking)
        return body

    def translate(self, frame: Frame, sofar: Sofar) -> bytes:
        if frame.document is None:
            return b""
        known = {key: value for key, value in frame.document.items() if key not in ("message", "response", "context")}
        out: dict[str, Any] = {key: known.pop(key) for key in ("model", "created_at") if key in known}
        if sofar.head is not None and "model" in sofar.head:
            out["model"] = sofar.head["model"]
        piece: dict[str, Any] = {"response": frame.text} if self._generate else {"content": frame.text}
        if frame.thinking:
            piece["thinking"] = frame.thinking
        out |= piece if self._generate else {"message": {"role": "assistant", **piece}}
        out |= known
        if frame.last:
            out |= _native_figures(known, sofar)
        return jsons.compact(out) + b"\n"

    def close(self, reason: str, sofar: Sofar) -> bytes:
        document = {"done": True, "done_reason": reason, "eval_count": 0}
        if sofar.head is not None:
            document |= {key: sofar.head[key] for key in ("model", "created_at") if key in sofar.head}
        return self.translate(Frame(document, last=True), sofar)

    def error(self, message: str) -> bytes:
        return jsons.compact({"error": message}) + b"\n"


class Events:
    """A stream of server-sent events that is passed on but not continued: ends with an error in its own shape."""

    end = re.compile(rb"\r?\n\r?\n")
    marks = re.compile(
        rb'\[DONE\]|"error"|"finish_reason"\s*:\s*"|"message_stop"|"response\.(?:completed|incomplete|failed)"'
    )

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self, frame: bytes) -> Frame:
        data = event_data(frame)
        if not data:
            return Frame()
        if data == b"[DONE]":
            return Frame(complete=True, last=True)
        document = jsons.parse_object(data)
        if document is None:
            return Frame(error="an event that is no JSON")
        kind = document.get("type")
        last = kind in ("message_stop", "response.completed", "response.incomplete", "response.failed")
        error = words.error_in(document) if kind in (None, "error") else None
        return Frame(document, text=" ", complete=last, last=last, error=error)

    def refusal(self, request: Document) -> str | None:  # noqa: ARG002
        return f"an answer of {self._path} cannot be continued"

    def budget(self, request: Document) -> int | None:  # noqa: ARG002
        return None

    def call(self, request: Document, sofar: Sofar, prompt: str | None) -> HttpCall:  # noqa: ARG002
        return HttpCall("POST", self._path, jsons.compact(request), JSON)

    def render_call(self, request: Document) -> HttpCall | None:  # noqa: ARG002
        return None

    def translate(self, frame: Frame, sofar: Sofar) -> bytes:  # noqa: ARG002
        return b"" if frame.document is None else b"data: " + jsons.compact(frame.document) + b"\n\n"

    def close(self, reason: str, sofar: Sofar) -> bytes:  # noqa: ARG002
        return b"data: [DONE]\n\n"

    def error(self, message: str) -> bytes:
        if self._path == "/v1/messages":
            body: Document = {"type": "error", "error": {"type": "api_error", "message": message}}
            return b"event: error\ndata: " + jsons.compact(body) + b"\n\n"
        if self._path == "/v1/responses":
            body = {"type": "error", "code": "server_error", "message": message, "param": None}
            return b"event: error\ndata: " + jsons.compact(body) + b"\n\n"
        body = {"error": {"message": message, "type": "api_error", "param": None, "code": "stream_cut"}}
        return b"data: " + jsons.compact(body) + b"\n\n"


class OpenAIChat(Events):
    """``/v1/chat/completions``."""

    marks = re.compile(rb'\[DONE\]|"error"|"finish_reason"\s*:\s*"|"usage"\s*:\s*\{|"tool_calls"|"function_call"')

    def __init__(self) -> None:
        super().__init__("/v1/chat/completions")

    def read(self, frame: bytes) -> Frame:
        read = super().read(frame)
        if read.document is None:
            return read
        choices = jsons.objects(read.document.get("choices"), 1)
        choice = choices[0] if choices else {}
        inner = choice.get("delta")
        delta: Document = inner if isinstance(inner, dict) else {}
        return replace(
            read,
            text=jsons.text(delta.get("content")) or "",
            thinking=jsons.text(delta.get("reasoning_content")) or jsons.text(delta.get("reasoning")) or "",
            tools=bool(delta.get("tool_calls") or delta.get("function_call")),
            complete=isinstance(choice.get("finish_reason"), str),
        )

    def refusal(self, request: Document) -> str | None:
        for key in ("tools", "functions", "logprobs", "grammar", "json_schema", "guided_json", "guided_regex"):
            if request.get(key):
                return f"an answer with `{key}` cannot be continued"
        shape = request.get("response_format")
        if isinstance(shape, dict) and shape.get("type") not in (None, "text"):
            return "an answer with `response_format` cannot be continued"
        if (jsons.whole(request.get("n")) or 1) > 1:
            return "several answers at once cannot be continued"
        if not isinstance(request.get("messages"), list):
            return "an answer to this kind of prompt cannot be continued"
        return None

    def budget(self, request: Document) -> int | None:
        bounds = [_positive(request.get(key)) for key in ("max_completion_tokens", "max_tokens")]
        return min((bound for bound in bounds if bound is not None), default=None)

    def call(self, request: Document, sofar: Sofar, prompt: str | None) -> HttpCall:  # noqa: ARG002
        body = dict(request)
        body["messages"] = with_answer(list(request["messages"]), sofar.text, "reasoning_content", sofar.thinking)
        for key in ("max_completion_tokens", "max_tokens"):
            bound = _positive(request.get(key))
            if bound is not None:
                body[key] = max(bound - sofar.tokens, 1)
        return HttpCall("POST", self._path, jsons.compact(body), JSON)

    def translate(self, frame: Frame, sofar: Sofar) -> bytes:
        if frame.last:
            return b"data: [DONE]\n\n"
        if frame.document is None:
            return b""
        has_figures = isinstance(frame.document.get("usage"), dict) or isinstance(frame.document.get("timings"), dict)
        if not (frame.text or frame.thinking or frame.complete or has_figures) and sofar.head is not None:
            return b""  # the opening delta with its role: the client has had one
        document = dict(frame.document)
        for key in ("id", "created", "model", "system_fingerprint"):
            if sofar.head is not None and key in sofar.head:
                document[key] = sofar.head[key]
        if has_figures:
            document |= _openai_figures(document, sofar)
        if has_figures or frame.complete:
            document["gpumesh"] = _note(sofar)
        return b"data: " + jsons.compact(document) + b"\n\n"

    def close(self, reason: str, sofar: Sofar) -> bytes:
        head = {key: value for key, value in (sofar.head or {}).items() if key not in ("choices", "usage", "timings")}
        if not reason:  # the client has had the finish frame
            return b"data: [DONE]\n\n"
        choice = {"index": 0, "delta": {}, "finish_reason": reason}
        frame = {**head, "choices": [choice], "gpumesh": _note(sofar)}
        return b"data: " + jsons.compact(frame) + b"\n\ndata: [DONE]\n\n"


def form_of(path: str) -> Form:
    if path in ("/api/chat", "/api/generate"):
        return Native(generate=path == "/api/generate")
    return OpenAIChat() if path == "/v1/chat/completions" else Events(path)


def event_data(frame: bytes) -> bytes:
    """The data of one server-sent event."""
    parts = []
    for line in frame.split(b"\n"):
        field, _, value = line.rstrip(b"\r").partition(b":")
        if field in (b"data", b"error"):
            parts.append(value.removeprefix(b" "))
    return b"\n".join(parts).strip()


def with_answer(messages: list[Any], text: str, thinking_key: str, thinking: str) -> list[Any]:
    """The messages with the answer so far as the last: joined to the client's own, if it began the answer itself."""
    last = messages[-1] if messages else None
    if isinstance(last, dict) and last.get("role") == "assistant" and isinstance(last.get("content"), str):
        return [*messages[:-1], {**last, "content": last["content"] + text}]
    message = {"role": "assistant", "content": text}
    return [*messages, message | {thinking_key: thinking} if thinking else message]


def _chat(body: dict[str, Any], options: dict[str, Any]) -> HttpCall:
    if options:
        body["options"] = options
    return HttpCall("POST", "/api/chat", jsons.compact(body), JSON)


def _options(request: Document) -> dict[str, Any]:
    options = request.get("options")
    return dict(options) if isinstance(options, dict) else {}


def _images(request: Document) -> bool:
    messages = request.get("messages")
    return bool(request.get("images")) or any(
        isinstance(message, dict) and message.get("images")
        for message in (messages if isinstance(messages, list) else ())
    )


def _positive(value: Any) -> int | None:
    return jsons.whole(value) or None


def _note(sofar: Sofar) -> dict[str, int]:
    return {"continued": sofar.cuts, "tokens_before": sofar.tokens}


def _native_figures(figures: Document, sofar: Sofar) -> dict[str, Any]:
    """The last attempt saw what was said before as part of its prompt; durations of what was cut are by our clock."""
    out: dict[str, Any] = {"eval_count": (jsons.whole(figures.get("eval_count")) or 0) + sofar.tokens}
    prompt = jsons.whole(figures.get("prompt_eval_count"))
    if prompt is not None:
        out["prompt_eval_count"] = max(prompt - sofar.tokens, 0)
    out["eval_duration"] = (jsons.whole(figures.get("eval_duration")) or 0) + round(sofar.spent_ms * 1e6)
    out["total_duration"] = max(round(sofar.elapsed_ms * 1e6), jsons.whole(figures.get("total_duration")) or 0)
    return out | {"gpumesh": _note(sofar)}


def _openai_figures(document: Document, sofar: Sofar) -> dict[str, Any]:
    out: dict[str, Any] = {}
    usage, timings = document.get("usage"), document.get("timings")
    if isinstance(usage, dict):
        prompt = max((jsons.whole(usage.get("prompt_tokens")) or 0) - sofar.tokens, 0)
        tokens = (jsons.whole(usage.get("completion_tokens")) or 0) + sofar.tokens
        counts = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
        out["usage"] = {**usage, **counts}
    if isinstance(timings, dict):
        tokens = (jsons.whole(timings.get("predicted_n")) or 0) + sofar.tokens
        took_ms = (jsons.number(timings.get("predicted_ms")) or 0.0) + sofar.spent_ms
        out["timings"] = {**timings, "predicted_n": tokens, "predicted_ms": took_ms}
        if tokens and took_ms:
            rates = {"predicted_per_token_ms": took_ms / tokens, "predicted_per_second": 1000.0 * tokens / took_ms}
            out["timings"] |= rates
    return out
