"""The dialect of Ollama's native API: NDJSON frames, durations in nanoseconds (``docs/internals/ollama.md``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Annotated, Any

import msgspec

from gpumesh.backends import model_list, safe_json, unusable_answers
from gpumesh.backends.base import (
    JSON_HEADERS,
    LONGEST_MS,
    MOST_TOKENS,
    ChatRequest,
    Chunk,
    ContinuationMethod,
    HttpCall,
    Inventory,
    Message,
    ParallelismSource,
    ProbeAnswers,
    ServerCounters,
    duration_ms,
    successful_body,
    token_count,
)
from gpumesh.backends.error_text import describe_web_page, error_text, find_error_message, is_web_page, printable_label
from gpumesh.backends.frames import BaseFrameReader, LineSplitter, final_chunk, wrong_dialect_error
from gpumesh.errors import BackendError, ProbeError
from gpumesh.state import LoadedModel, ModelInfo
from gpumesh.text.model_names import full_name
from gpumesh.text.printable import printable
from gpumesh.text.quoting import paste_command

_MISSING = object()  # stands for a member that is not there; ``None`` stands for a member whose value is null
NS_PER_MS = 1e6  # Ollama's durations are in nanoseconds
_Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=int(LONGEST_MS * NS_PER_MS))]
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]


class OllamaDialect:
    """Implements ``base.Dialect``."""

    label = "Ollama"
    chat_path = "/api/chat"
    has_exact_names = False
    has_model_store = True
    parallelism = ParallelismSource.DURATIONS
    continuation = ContinuationMethod.TEMPLATE
    required_probes = frozenset({"version", "tags"})
    latency_probe = "version"
    identity_probe = "version"
    is_generic = False
    usual_port: int | None = 11434
    # `think` came with 0.9: an older server ignores it, and a thinking model writes its thoughts into the answer's
    # text.
    oldest_version: str | None = "0.9.0"
    update_hint: str | None = "update it: `curl -fsSL https://ollama.com/install.sh | sh`, or pull a newer image"

    def serves(self, path: str) -> bool:
        return path.startswith(("/api/", "/v1/"))

    def recognizes(self, status: int, body: bytes) -> bool:
        """Recognizes an answer with a version, or the empty 403 that refuses a Host header."""
        if status == 403:
            return not body.strip()
        if status != 200:
            return False
        document = safe_json.parse_report(body) or {}
        return safe_json.as_text(document.get("version")) is not None and "error" not in document

    def missing_model_hint(self, models: Sequence[str]) -> str:
        return "on the host: " + "; ".join(paste_command("ollama pull {MODEL}", MODEL=name) for name in models)

    def build_chat_call(self, request: ChatRequest) -> HttpCall:
        body: dict[str, Any] = {
            "model": request.model,
            "messages": [_build_message(message) for message in request.messages],
            "stream": request.stream,
        }
        if request.options:
            body["options"] = dict(request.options)
        if request.think is not None:
            body["think"] = request.think
        return HttpCall("POST", self.chat_path, safe_json.dump_compact(body), JSON_HEADERS)

    def create_reader(self, *, stream: bool) -> OllamaFrameReader:  # noqa: ARG002  # an answer in one piece is a stream of one line
        return OllamaFrameReader()

    def error_text(self, status: int, body: bytes) -> str:
        if status == 403 and not body.strip():
            return "HTTP 403 without a word: Ollama does not allow this Host or Origin"
        return error_text(status, body)

    def probe_calls(self) -> Mapping[str, HttpCall]:
        return {name: HttpCall("GET", f"/api/{name}") for name in ("version", "tags", "ps")}

    def read_inventory(self, answers: ProbeAnswers) -> Inventory:
        """The inventory from the answers to ``probe_calls``. Raises ProbeError with one of these codes as
        ``finding_code``: ``wrong-server``, ``backend-down``, ``host-refused``, ``key-refused``, ``answer-broken``,
        ``models-too-many``. The answer to ``ps`` may be missing: older servers do not have this route."""
        # A null counts as an unknown version, and as an empty list of models.
        version = self._read_answer(answers.get("version"), "/api/version", "version", (str, NoneType))
        tags = self._read_answer(answers.get("tags"), "/api/tags", "models", (list, NoneType))
        too_many_error = unusable_answers.long_list_error(tags["models"])
        if too_many_error is not None:
            raise too_many_error
        ps = safe_json.parse_report(successful_body(answers.get("ps"))) or {}
        models = model_list.read_listing(tags["models"], "name", "model", identity=full_name)
        models_in_memory = model_list.read_listing(ps.get("models"), "name", "model", identity=full_name)
        loaded_entries = models_in_memory.first_entries(model_list.MAX_LOADED_MODELS)
        return Inventory(
            version=printable(safe_json.as_text(version.get("version")) or "", 40) or None,
            catalog=tuple(_read_model(name, entry) for name, entry in models.entries.items()),
            loaded=tuple(_read_loaded_model(name, entry) for name, entry in loaded_entries),
            unusable=models.unusable,
        )

    def _read_answer(
        self, answer: tuple[int, bytes] | None, path: str, key: str, types: tuple[type, ...]
    ) -> dict[str, Any]:
        """The JSON object in the answer to ``path``. Raises ProbeError if there is no answer, or if it is no object
        whose member ``key`` has one of these ``types`` (``NoneType``: null)."""
        if answer is None:
            raise ProbeError(f"no answer to {path}", finding_code="backend-down")
        status, body = answer
        if status == 403 and not body.strip():
            raise ProbeError(
                "Ollama refuses our Host header (403 without a word)",
                finding_code="host-refused",
                hint="name the server as its own host does, http://127.0.0.1:PORT, or set OLLAMA_HOST=0.0.0.0 there",
            )
        unusable_answers.raise_for_status(status, body)
        document = safe_json.parse_report(body)
        if status == 200 and document is not None and isinstance(document.get(key, _MISSING), types):
            return document
        broken_error = unusable_answers.broken_json_error(body, path) if status == 200 else None
        raise broken_error or wrong_server_error(status, body, document, path)


class OllamaFrameReader(BaseFrameReader):
    """Reads the chunks of an answer of ``/api/chat`` or ``/api/generate``, streamed or in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self._lines = LineSplitter()

    def _read_data(self, data: bytes, chunks: list[Chunk]) -> None:
        for line in self._lines.feed(data):
            self._read_frame(line, chunks)

    def _read_rest(self, chunks: list[Chunk]) -> None:
        rest = self._lines.take_rest()
        if safe_json.parse_object(rest) is not None:  # otherwise the line was cut
            self._read_frame(rest, chunks)

    def _read_frame(self, line: bytes, chunks: list[Chunk]) -> None:
        """Adds the chunk of one frame to ``chunks``. Lines that are blank or come after the final frame are skipped.
        Raises BackendError and ProbeError."""
        if self.done or not line.strip():
            return
        frame = safe_json.parse_object(line)
        if frame is None:
            raise wrong_dialect_error(f"{printable(line, 60)!r} is no frame")
        error = find_error_message(frame)
        if error is not None:
            raise BackendError(f"the server stopped in mid-answer: {error}")
        message = frame.get("message")
        if isinstance(message, dict):  # /api/chat
            text, thinking = safe_json.as_text(message.get("content")), safe_json.as_text(message.get("thinking"))
        else:  # /api/generate
            text, thinking = safe_json.as_text(frame.get("response")), safe_json.as_text(frame.get("thinking"))
        text, thinking = text or "", thinking or ""
        if frame.get("done") is True:
            self.done = True
            reason = safe_json.as_text(frame.get("done_reason"))
            chunks.append(final_chunk(text, thinking, reason=reason, counters=parse_counters(frame)))
        elif text or thinking:
            chunks.append(Chunk(text, thinking))


def parse_counters(frame: Mapping[str, Any]) -> ServerCounters:
    """The counters of a final frame; each of them may be absent."""
    get = frame.get
    return ServerCounters(
        prompt_tokens=token_count(get("prompt_eval_count")),
        tokens=token_count(get("eval_count")),
        total_ms=duration_ms(get("total_duration"), per_ms=NS_PER_MS),
        load_ms=duration_ms(get("load_duration"), per_ms=NS_PER_MS),
        prompt_ms=duration_ms(get("prompt_eval_duration"), per_ms=NS_PER_MS),
        eval_ms=duration_ms(get("eval_duration"), per_ms=NS_PER_MS),
    )


class _Figures(msgspec.Struct, gc=False):
    """The figures of a final frame, durations in ns. The bounds are those of ``token_count`` and ``duration_ms``."""

    total_duration: _Nanoseconds
    load_duration: _Nanoseconds | None = None
    prompt_eval_count: _Tokens | None = None
    prompt_eval_duration: _Nanoseconds | None = None
    eval_count: _Tokens | None = None
    eval_duration: _Nanoseconds | None = None


_decode_figures = msgspec.json.Decoder(_Figures).decode


def find_usual_counters(data: bytes) -> ServerCounters | None:
    """The counters of a small final frame as Ollama writes it, several times as fast as ``parse_counters`` gives them.
    ``None`` for anything else, also for a frame with an impossible figure."""
    if len(data) > safe_json.SMALL_BYTES or b'"total_duration"' not in data:
        return None
    try:
        figures = _decode_figures(data)
    except (ValueError, RecursionError):  # no such frame, or a figure outside of its bounds
        return None
    load, prompt, answer = figures.load_duration, figures.prompt_eval_duration, figures.eval_duration
    return ServerCounters(
        figures.prompt_eval_count,
        figures.eval_count,
        figures.total_duration / NS_PER_MS,
        None if load is None else load / NS_PER_MS,
        None if prompt is None else prompt / NS_PER_MS,
        None if answer is None else answer / NS_PER_MS,
    )


def wrong_server_error(status: int, body: bytes, document: dict[str, Any] | None, path: str) -> ProbeError:
    """The error for a port that answers to ``path``, but not as Ollama. The message names the kind of the other server
    if the answer shows it. ``document`` is the body's JSON object; ``None`` if the body is none."""
    hint = "point `backend.port` or `backend.url` at Ollama (11434 unless OLLAMA_HOST says otherwise)"
    if is_web_page(body):
        description = describe_web_page(body)
    elif document is not None and ("object" in document or isinstance(document.get("error"), dict)):
        # A list and an error of OpenAI's API have this form.
        description = "an OpenAI-compatible server (llama-server, vLLM, LM Studio …)"
        hint = "leave out `backend.kind`, which is found by asking, or " + hint
    else:
        description = f"HTTP {status} {printable(body, 60)!r}" if body.strip() else f"HTTP {status}"
        if path == "/api/tags":  # the answer to /api/version, which is read first, was Ollama's
            hint = "a proxy before it passes only some paths on: let it pass all of /api/, or go around it"
    return ProbeError(
        f"the port answers, but not as Ollama: {path} gave {description}", finding_code="wrong-server", hint=hint
    )


def _build_message(message: Message) -> dict[str, Any]:
    """The message as this API has it."""
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        body["images"] = list(message.images)
    return body


def _read_model(name: str, entry: Mapping[str, Any]) -> ModelInfo:
    """A model by its entry in ``/api/tags``."""
    details = entry.get("details")
    details = details if isinstance(details, dict) else {}
    return ModelInfo(
        name=name,
        digest=printable_label(entry.get("digest")),
        size_mib=safe_json.as_mib(entry.get("size")),
        modified_at=printable_label(entry.get("modified_at")),
        parameter_size=printable_label(details.get("parameter_size")),
        quantization=printable_label(details.get("quantization_level")),
        family=printable_label(details.get("family")),
    )


def _read_loaded_model(name: str, entry: Mapping[str, Any]) -> LoadedModel:
    """A model in memory by its entry in ``/api/ps``."""
    return LoadedModel(
        name=name,
        size_vram_mib=safe_json.as_mib(entry.get("size_vram")),
        size_mib=safe_json.as_mib(entry.get("size")),
        expires_at=safe_json.as_datetime(entry.get("expires_at")),
        context_length=safe_json.as_bounded_count(entry.get("context_length"), model_list.MAX_CONTEXT_TOKENS),
    )
