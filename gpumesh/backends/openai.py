"""The dialect of any server with OpenAI's API (SGLang, LM Studio …); those of llama-server and vLLM are built on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpumesh.backends import model_list, safe_json, unusable_answers
from gpumesh.backends.base import (
    JSON_HEADERS,
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
from gpumesh.backends.error_text import error_text, find_error_message, printable_label
from gpumesh.backends.event_reader import BaseEventReader
from gpumesh.backends.frames import BODY_LIMIT, BaseFrameReader, final_chunk, wrong_dialect_error
from gpumesh.errors import BackendError, ProbeError
from gpumesh.state import LoadedModel, ModelInfo
from gpumesh.text.printable import printable

# Ollama's names of options -> the names in this API. top_k, min_p and repeat_penalty do not belong to OpenAI's own API,
# but these servers take them by Ollama's names. Options that are not here (num_ctx, num_gpu …) are set when such a
# server starts, so they are left out.
_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repeat_penalty": "repeat_penalty",
    "num_predict": "max_tokens",
}
# The ``owned_by`` of servers that list the models in memory. Other servers list the models on disk.
_OWNERS_IN_MEMORY = frozenset({"llamacpp", "vllm", "sglang"})
_LM_STUDIO_PATHS = ("/api/v0/", "/api/v1/")  # its own API
MOST_SLOTS = 4096  # a larger number of slots is not believed
MAX_OWNERS = 64  # the owners of so many entries of a list are read: a server has one owner, or a few
MOST_PARAMETERS = 10**15  # a larger number of parameters is not believed
# The type of an image, by the first five characters of its base64. An image that is not here is taken for a JPEG.
_IMAGE_TYPES = {"iVBOR": "png", "R0lGO": "gif", "UklGR": "webp"}


class OpenAIDialect:
    """Implements ``base.Dialect``."""

    label = "an OpenAI-compatible server"
    chat_path = "/v1/chat/completions"
    has_exact_names = True
    has_model_store = False
    parallelism = ParallelismSource.PROBE
    continuation = ContinuationMethod.FOUND_OUT
    required_probes = frozenset({"models"})
    latency_probe = "models"
    identity_probe = "models"
    is_generic = True
    usual_port: int | None = None
    oldest_version: str | None = None
    update_hint: str | None = None

    def serves(self, path: str) -> bool:
        return not path.startswith("/api/") or path.startswith(_LM_STUDIO_PATHS)

    def recognizes(self, status: int, body: bytes) -> bool:
        """Recognizes the list of models. Other kinds have such a list too, so they must be tried first."""
        return status == 200 and isinstance((safe_json.parse_report(body) or {}).get("data"), list)

    def missing_model_hint(self, models: Sequence[str]) -> str:  # noqa: ARG002 - the message before the hint names them
        return "start the server with this model, or under this name (`--alias`, `--served-model-name`)"

    def build_chat_call(self, request: ChatRequest) -> HttpCall:
        body: dict[str, Any] = {
            "model": request.model,
            "messages": [_build_message(message) for message in request.messages],
            "stream": request.stream,
        }
        if request.stream:
            body["stream_options"] = {"include_usage": True}  # without it, a stream has no counters
        for name, value in request.options.items():
            if name == "num_predict" and not safe_json.as_count(value):
                continue  # a number below 1 means "no limit" to Ollama: then this API gets no max_tokens
            if name in _OPTIONS:
                body[_OPTIONS[name]] = value
        if isinstance(request.think, str):  # an effort, such as "high"
            body["reasoning_effort"] = request.think
        elif request.think is not None:
            body["chat_template_kwargs"] = {"enable_thinking": request.think}
        return HttpCall("POST", self.chat_path, safe_json.dump_compact(body), JSON_HEADERS)

    def create_reader(self, *, stream: bool) -> OpenAIEventReader | OpenAIBodyReader:
        return OpenAIEventReader() if stream else OpenAIBodyReader()

    def error_text(self, status: int, body: bytes) -> str:
        return error_text(status, body)

    def probe_calls(self) -> Mapping[str, HttpCall]:
        """The GET requests that give the inventory, by name. All such servers answer ``models``; the other calls add to
        the inventory where they exist. ``/slots`` of llama-server is not asked for: it may hold other people's prompts,
        and ``/props`` has the number of slots."""
        return {
            "models": HttpCall("GET", "/v1/models"),
            "health": HttpCall("GET", "/health"),
            "props": HttpCall("GET", "/props"),
            "version": HttpCall("GET", "/version"),
        }

    def read_inventory(self, answers: ProbeAnswers) -> Inventory:
        """The inventory from the answers to ``probe_calls``. Raises ProbeError with one of these codes as
        ``finding_code``: ``wrong-server``, ``backend-down``, ``key-refused``, ``answer-broken``, ``models-too-many``.
        Only the answer to ``models`` is needed."""
        answer = answers.get("models")
        if answer is None:
            raise ProbeError("no answer to /v1/models", finding_code="backend-down")
        status, body = answer
        unusable_answers.raise_for_status(status, body)  # llama-server: 503 "Loading model"
        document = safe_json.parse_report(body) or {}
        entries = document.get("data")
        if status != 200 or not isinstance(entries, list):
            broken_error = unusable_answers.broken_json_error(body, "/v1/models") if status == 200 else None
            raise broken_error or unusable_answers.other_server_error(self.label, "/v1/models", status, body)
        too_many_error = unusable_answers.long_list_error(entries)
        if too_many_error is not None:
            raise too_many_error
        health_status, health_body = answers.get("health") or (None, b"")
        if health_status == 503:  # the server still lists its models, but cannot use them: vLLM's engine is dead
            raise unusable_answers.unavailable_error(503, health_body)
        props = read_object(answers.get("props"))
        version = read_object(answers.get("version"))
        models = model_list.read_listing(entries, "id")
        models_in_memory = [
            (name, entry)
            for name, entry in models.entries.items()
            if safe_json.as_text(entry.get("owned_by")) in _OWNERS_IN_MEMORY
        ][: model_list.MAX_LOADED_MODELS]
        slot_context = _read_slot_context(props)
        return Inventory(
            # llama-server's version, or else that of vLLM and others.
            version=printable_label(props.get("build_info")) or printable_label(version.get("version")),
            catalog=tuple(_read_model(name, entry) for name, entry in models.entries.items()),
            loaded=tuple(_read_loaded_model(name, entry, slot_context) for name, entry in models_in_memory),
            parallel=safe_json.as_bounded_count(props.get("total_slots"), MOST_SLOTS) or None,
            unusable=models.unusable,
        )


class OpenAIEventReader(BaseEventReader):
    """Reads the chunks of a streamed chat or completion. The final chunk comes at ``[DONE]``, because the usage may
    come as late as just before it."""

    def __init__(self) -> None:
        super().__init__()
        self._finish_reason: str | None = None
        self._counters: ServerCounters | None = None

    def _read_rest(self, chunks: list[Chunk]) -> None:
        """Adds the chunks of the last event, and the final chunk if the finish reason has come."""
        super()._read_rest(chunks)
        if not self.done and self._finish_reason is not None:
            # The text is complete: some servers end the stream without [DONE].
            self._finish(chunks)

    def _is_whole(self, event: bytes) -> bool:
        return event.strip() == b"[DONE]" or super()._is_whole(event)

    def _read_event(self, event: bytes, chunks: list[Chunk]) -> None:
        if self.done or event.strip() != b"[DONE]":
            super()._read_event(event, chunks)
        elif self._finish_reason is not None or self._counters is not None:
            self._finish(chunks)
        # Else no event has said that the answer is complete: the server failed. ``close`` will raise StreamCut.

    def _read_frame(self, frame: dict[str, Any], chunks: list[Chunk]) -> None:
        self._counters = parse_counters(frame) or self._counters
        text, thinking, finish_reason = _read_first_choice(frame, "delta")
        self._finish_reason = finish_reason or self._finish_reason
        if text or thinking:
            chunks.append(Chunk(text, thinking))

    def _finish(self, chunks: list[Chunk]) -> None:
        """Adds the final chunk."""
        self.done = True
        chunks.append(final_chunk(reason=self._finish_reason, counters=self._counters))


class OpenAIBodyReader(BaseFrameReader):
    """Reads an answer in one piece, which becomes one chunk, the final one."""

    def __init__(self) -> None:
        super().__init__()
        self._body = bytearray()

    def _read_data(self, data: bytes, chunks: list[Chunk]) -> None:  # noqa: ARG002  # the only chunk comes at the end
        if len(self._body) + len(data) > BODY_LIMIT:
            raise wrong_dialect_error(f"more than {BODY_LIMIT >> 20} MiB")
        self._body += data

    def _read_rest(self, chunks: list[Chunk]) -> None:
        """Adds the answer as the final chunk. Raises BackendError for an error of the server, and ProbeError for an
        answer in another form."""
        body = bytes(self._body).strip()
        frame = safe_json.parse_object(body)
        if frame is None:
            if body and not body.startswith(b"{"):
                raise wrong_dialect_error(f"{printable(body, 60)!r} is no answer")
            return  # the answer was cut: ``close`` will raise StreamCut
        error = find_error_message(frame)
        if error is not None:
            raise BackendError(f"the server answered with an error: {error}")
        text, thinking, reason = _read_first_choice(frame, "message")
        self.done = True
        chunks.append(final_chunk(text, thinking, reason=reason, counters=parse_counters(frame)))


def owner_names(body: bytes) -> frozenset[str]:
    """The ``owned_by`` of the models in an answer of ``/v1/models``: servers write their own name there."""
    document = safe_json.parse_report(body) or {}
    entries = safe_json.as_objects(document.get("data"), MAX_OWNERS)
    names = (safe_json.as_text(entry.get("owned_by")) for entry in entries)
    return frozenset(name for name in names if name is not None)


def parse_counters(frame: Mapping[str, Any]) -> ServerCounters | None:
    """The counters of OpenAI's ``usage``. Counts that it lacks, and all durations (ms), come from llama-server's
    ``timings``. ``None`` if the frame has neither of the two."""
    usage, timings = frame.get("usage"), frame.get("timings")
    usage = usage if isinstance(usage, dict) else {}
    timings = timings if isinstance(timings, dict) else {}
    if not usage and not timings:
        return None
    # The second name of each count is from /v1/responses and from Anthropic's API.
    prompt_tokens = token_count(usage.get("prompt_tokens", usage.get("input_tokens")))
    if prompt_tokens is not None and "cache_read_input_tokens" in usage:
        # Anthropic's ``input_tokens`` counts only the tokens that neither came from the cache nor were added to it.
        prompt_tokens += token_count(usage["cache_read_input_tokens"]) or 0
        prompt_tokens += token_count(usage.get("cache_creation_input_tokens")) or 0
    if prompt_tokens is None and timings:
        # prompt_n counts only the tokens that were computed, cache_n those that came from the cache.
        prompt_tokens = (token_count(timings.get("prompt_n")) or 0) + (token_count(timings.get("cache_n")) or 0)
    completion_tokens = token_count(usage.get("completion_tokens", usage.get("output_tokens")))
    cached_tokens = _count_cached_tokens(usage, timings)
    if cached_tokens is not None and (prompt_tokens is None or cached_tokens > prompt_tokens):
        cached_tokens = None  # a part of the prompt cannot be larger than the prompt
    return ServerCounters(
        prompt_tokens=prompt_tokens,
        tokens=completion_tokens if completion_tokens is not None else token_count(timings.get("predicted_n")),
        prompt_ms=duration_ms(timings.get("prompt_ms")),
        eval_ms=duration_ms(timings.get("predicted_ms")),
        cached_tokens=cached_tokens,
    )


def _count_cached_tokens(usage: Mapping[str, Any], timings: Mapping[str, Any]) -> int | None:
    """How many tokens of the prompt came from the server's cache; ``None`` if the server does not say it.

    llama-server says it in ``timings``. vLLM (started with ``--enable-prompt-tokens-details``), SGLang (with
    ``--enable-cache-report``) and llama-server say it in ``usage`` in the forms of the three APIs.
    """
    if "cache_n" in timings:
        return token_count(timings["cache_n"])
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict):
        return token_count(details.get("cached_tokens"))
    if "cache_read_input_tokens" in usage:  # of /v1/messages
        return token_count(usage["cache_read_input_tokens"])
    details = usage.get("input_tokens_details")  # of /v1/responses
    if isinstance(details, dict):
        # Ollama always writes 0 here (``openai/responses.go``), so 0 says nothing.
        return token_count(details.get("cached_tokens")) or None
    return None


def _read_first_choice(frame: Mapping[str, Any], key: str) -> tuple[str, str, str | None]:
    """The text, the thinking and the finish reason of the first choice of a chat or a completion. ``key``: ``delta`` in
    a stream, ``message`` in a whole answer. A completion has its text in the choice itself."""
    choices = safe_json.as_objects(frame.get("choices"), 1)
    if not choices:
        return "", "", None
    (choice,) = choices
    message = choice.get(key)
    message = message if isinstance(message, dict) else {}
    text = safe_json.as_text(message.get("content")) or safe_json.as_text(choice.get("text")) or ""
    thinking = safe_json.as_text(message.get("reasoning_content")) or safe_json.as_text(message.get("reasoning")) or ""
    return text, thinking, safe_json.as_text(choice.get("finish_reason"))


def _build_message(message: Message) -> dict[str, Any]:
    """The message as this API has it: with images, its content is a list of parts."""
    if not message.images:
        return {"role": message.role, "content": message.content}
    parts: list[dict[str, Any]] = [{"type": "text", "text": message.content}]
    for image in message.images:
        image_type = _IMAGE_TYPES.get(image[:5], "jpeg")  # see ``_IMAGE_TYPES``
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/{image_type};base64,{image}"}})
    return {"role": message.role, "content": parts}


def read_object(answer: tuple[int, bytes] | None) -> dict[str, Any]:
    """The JSON object in a probe's answer with status 200; an empty object if there is no such answer."""
    return safe_json.parse_report(successful_body(answer)) or {}


def _read_slot_context(props: Mapping[str, Any]) -> int | None:
    """The context of one slot in tokens, from llama-server's ``/props``; ``None`` for other servers."""
    settings = props.get("default_generation_settings")
    if not isinstance(settings, dict):
        return None
    return safe_json.as_bounded_count(settings.get("n_ctx"), model_list.MAX_CONTEXT_TOKENS)


def _read_model(name: str, entry: Mapping[str, Any]) -> ModelInfo:
    """A model by its entry in ``/v1/models``. Only llama-server's entries have ``meta``."""
    meta = entry.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    parameters = safe_json.as_bounded_count(meta.get("n_params"), MOST_PARAMETERS)
    return ModelInfo(
        name=name,
        size_mib=safe_json.as_mib(meta.get("size")),
        parameter_size=None if parameters is None else f"{parameters / 1e9:.1f}B",
    )


def _read_loaded_model(name: str, entry: Mapping[str, Any], slot_context: int | None) -> LoadedModel:
    """A model in memory by its entry in ``/v1/models``. vLLM's entries have ``max_model_len``, the context in tokens;
    for llama-server, ``slot_context`` is known."""
    max_length = safe_json.as_bounded_count(entry.get("max_model_len"), model_list.MAX_CONTEXT_TOKENS)
    return LoadedModel(name=name, context_length=slot_context or max_length)
