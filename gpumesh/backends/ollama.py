"""Ollama's native API: NDJSON frames, nanoseconds, and silent endings (shared facts: ollama-api.md)."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

from gpumesh.backends import model_list, safe_json, unusable_answers
from gpumesh.backends.base import (
    ChatRequest,
    Chunk,
    Counters,
    HttpCall,
    Inventory,
    Message,
    duration_ms,
    token_count,
)
from gpumesh.backends.error_text import error_in, error_text, is_page, page_name, short
from gpumesh.backends.frames import Lines, Reader, final, not_this_server
from gpumesh.errors import BackendError, ProbeError
from gpumesh.printable import printable
from gpumesh.state import LoadedModel, ModelInfo

JSON = (("Content-Type", "application/json"),)
_MISSING = object()
Answers = Mapping[str, tuple[int, bytes] | None]


class Ollama:
    """Implements ``base.Dialect``."""

    def chat(self, request: ChatRequest) -> HttpCall:
        body: dict[str, Any] = {
            "model": request.model,
            "messages": [_message(message) for message in request.messages],
            "stream": request.stream,
        }
        if request.options:
            body["options"] = dict(request.options)
        if request.think is not None:
            body["think"] = request.think
        return HttpCall("POST", "/api/chat", safe_json.compact(body), JSON)

    def reader(self, *, stream: bool) -> NativeReader:  # noqa: ARG002  # an answer in one piece is a stream of one line
        return NativeReader()

    def error_text(self, status: int, body: bytes) -> str:
        if status == 403 and not body.strip():
            return "HTTP 403 without a word: Ollama does not allow this Host or Origin"
        return error_text(status, body)

    def probe_calls(self) -> Mapping[str, HttpCall]:
        return {name: HttpCall("GET", f"/api/{name}") for name in ("version", "tags", "ps")}

    def inventory(self, answers: Answers) -> Inventory:
        """Raises ProbeError, its ``finding`` being ``wrong-server``, ``backend-down``, ``host-refused``,
        ``key-refused``, ``answer-broken`` or ``models-too-many``. ``ps`` may be missing: older servers do not have
        it."""
        version = self._required(answers.get("version"), "/api/version", "version", (str, NoneType))
        tags = self._required(answers.get("tags"), "/api/tags", "models", (list, NoneType))
        too_many = unusable_answers.too_many(tags["models"])
        if too_many is not None:
            raise too_many
        ps = answers.get("ps")
        loaded = safe_json.parse_report(ps[1]) if ps is not None and ps[0] == 200 else None
        models = model_list.read(tags["models"], "name", "model", key=model_list.without_case)
        resident = model_list.read((loaded or {}).get("models"), "name", "model", key=model_list.without_case)
        return Inventory(
            version=printable(safe_json.text(version.get("version")) or "", 40) or None,
            catalog=tuple(_model(name, item) for name, item in models.named.items()),
            loaded=tuple(_loaded(name, item) for name, item in resident.first(model_list.MOST_LOADED)),
            unusable=models.unusable,
        )

    def _required(
        self, answer: tuple[int, bytes] | None, path: str, key: str, kinds: tuple[type, ...]
    ) -> dict[str, Any]:
        if answer is None:
            raise ProbeError(f"no answer to {path}", finding="backend-down")
        status, body = answer
        if status == 403 and not body.strip():
            raise ProbeError(
                "Ollama refuses our Host header (403 without a word)",
                finding="host-refused",
                hint="name the server as its own host does, http://127.0.0.1:PORT, or set OLLAMA_HOST=0.0.0.0 there",
            )
        unusable_answers.check(status, body)
        document = safe_json.parse_report(body)
        if status == 200 and document is not None and isinstance(document.get(key, _MISSING), kinds):
            return document
        raise (unusable_answers.half_json(body, path) if status == 200 else None) or wrong_server(
            status, body, document, path
        )


class NativeReader(Reader):
    """Frames of ``/api/chat`` and ``/api/generate``, streamed or whole."""

    def __init__(self) -> None:
        super().__init__()
        self._lines = Lines()

    def _take(self, data: bytes, chunks: list[Chunk]) -> None:
        for line in self._lines.feed(data):
            self._frame(line, chunks)

    def _end(self, chunks: list[Chunk]) -> None:
        rest = self._lines.rest()
        if safe_json.parse_object(rest) is not None:  # half a line is what a cut leaves behind
            self._frame(rest, chunks)

    def _frame(self, line: bytes, chunks: list[Chunk]) -> None:
        if self.done or not line.strip():
            return
        frame = safe_json.parse_object(line)
        if frame is None:
            raise not_this_server(f"{printable(line, 60)!r} is no frame")
        error = error_in(frame)
        if error is not None:
            raise BackendError(f"the server stopped in mid-answer: {error}")
        message = frame.get("message")
        source = message if isinstance(message, dict) else frame
        text = safe_json.text(source.get("content" if source is message else "response")) or ""
        thinking = safe_json.text(source.get("thinking")) or ""
        if frame.get("done") is True:
            self.done = True
            reason = safe_json.text(frame.get("done_reason"))
            chunks.append(final(text, thinking, reason=reason, counters=counters(frame)))
        elif text or thinking:
            chunks.append(Chunk(text, thinking))


def counters(frame: Mapping[str, Any]) -> Counters:
    """Of a final frame; its durations are nanoseconds, each may be absent."""

    def ms(key: str) -> float | None:
        return duration_ms(frame.get(key), per_ms=1e6)

    return Counters(
        prompt_tokens=token_count(frame.get("prompt_eval_count")),
        tokens=token_count(frame.get("eval_count")),
        total_ms=ms("total_duration"),
        load_ms=ms("load_duration"),
        prompt_ms=ms("prompt_eval_duration"),
        eval_ms=ms("eval_duration"),
    )


def wrong_server(status: int, body: bytes, document: dict[str, Any] | None, path: str) -> ProbeError:
    """A port that answers, but not as Ollama: says as what, where that can be told."""
    hint = "point `backend.port` or `backend.url` at Ollama (11434 unless OLLAMA_HOST says otherwise)"
    if is_page(body):
        what = page_name(body)
    elif document is not None and ("object" in document or isinstance(document.get("error"), dict)):
        what = "an OpenAI-compatible server (llama-server, vLLM, LM Studio …)"
        hint = "set `backend.kind: openai` for it, or " + hint
    else:
        what = f"HTTP {status} {printable(body, 60)!r}" if body.strip() else f"HTTP {status}"
        if path == "/api/tags":  # /api/version was asked before, and was right
            hint = "a proxy before it passes only some paths on: let it pass all of /api/, or go around it"
    return ProbeError(f"the port answers, but not as Ollama: {path} gave {what}", finding="wrong-server", hint=hint)


def _message(message: Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        body["images"] = list(message.images)
    return body


def _model(name: str, item: Mapping[str, Any]) -> ModelInfo:
    details = item.get("details")
    details = details if isinstance(details, dict) else {}
    return ModelInfo(
        name=name,
        digest=short(item.get("digest")),
        size_mib=safe_json.mib(item.get("size")),
        modified_at=short(item.get("modified_at")),
        parameter_size=short(details.get("parameter_size")),
        quantization=short(details.get("quantization_level")),
        family=short(details.get("family")),
    )


def _loaded(name: str, item: Mapping[str, Any]) -> LoadedModel:
    return LoadedModel(
        name=name,
        size_vram_mib=safe_json.mib(item.get("size_vram")),
        size_mib=safe_json.mib(item.get("size")),
        expires_at=safe_json.instant(item.get("expires_at")),
        context_length=safe_json.up_to(item.get("context_length"), model_list.LONGEST_CONTEXT),
    )
