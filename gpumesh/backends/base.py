"""The values that a dialect reads and writes, whatever the server's kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Protocol

from gpumesh.backends import safe_json
from gpumesh.state import LoadedModel, ModelInfo

# Beyond these a server's figures for one answer are no figures: the balancer learns from them, and pools add them up.
MOST_TOKENS = 1 << 27
LONGEST_MS = 30 * 86400 * 1000.0
FASTEST_TOKENS_PER_S = 100_000.0


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One prompt, dialect-free. ``options`` are Ollama's names (``temperature``, ``num_predict``, ``num_ctx`` …)."""

    model: str
    messages: tuple[Message, ...]
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    stream: bool = True
    think: bool | str | None = None


@dataclass(frozen=True, slots=True)
class HttpCall:
    """What to send to a backend: path from the base URL on, JSON body."""

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ServerCounters:
    """The server's own figures for one answer; durations in ms; ``None`` where it did not say."""

    prompt_tokens: int | None = None
    tokens: int | None = None
    total_ms: float | None = None
    load_ms: float | None = None
    prompt_ms: float | None = None
    eval_ms: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Generation rate by the server's own clock; ``None`` for one that no hardware reaches."""
        if self.tokens is None or not self.eval_ms:
            return None
        seconds = self.eval_ms / 1000.0
        return self.tokens / seconds if self.tokens <= FASTEST_TOKENS_PER_S * seconds else None

    @property
    def waited_ms(self) -> float | None:
        """Time spent queued inside the server (docs/internals/ollama.md); ``None`` without the durations."""
        if self.total_ms is None or self.eval_ms is None:
            return None
        return max(self.total_ms - (self.load_ms or 0.0) - (self.prompt_ms or 0.0) - self.eval_ms, 0.0)


def token_count(value: Any) -> int | None:
    """A number of tokens as a server gives it; ``None`` for what cannot be one."""
    return safe_json.as_bounded_count(value, MOST_TOKENS)


def duration_ms(value: Any, *, per_ms: float = 1.0) -> float | None:
    """A duration as a server gives it, ``per_ms`` of its units being a millisecond; ``None`` for what cannot be one."""
    read = safe_json.as_number(value)
    return read / per_ms if read is not None and read / per_ms <= LONGEST_MS else None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. ``done`` on the final one only, which carries ``counters`` and ``done_reason``."""

    text: str = ""
    thinking: str = ""
    done: bool = False
    done_reason: str | None = None
    counters: ServerCounters | None = None


ProbeAnswers = Mapping[str, tuple[int, bytes] | None]
"""Status and body by the names of ``Dialect.probe_calls``; ``None`` for what was not answered."""
JSON_HEADERS = (("Content-Type", "application/json"),)


class FrameReader(Protocol):
    """Turns a response body's bytes into chunks, however they were cut up on the way.

    Raises BackendError for an error frame in mid-stream and ProbeError(finding='wrong-server') for what is no frame.
    """

    def feed(self, data: bytes) -> Sequence[Chunk]: ...

    def close(self) -> Sequence[Chunk]:
        """At end of stream. Raises StreamCut when the final frame never came."""
        ...


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """How busy a server says it is, whoever its clients are; ``None`` where it does not say. ``kv_cache_pct`` is the
    share of the memory for contexts that is in use."""

    running: int | None = None
    waiting: int | None = None
    kv_cache_pct: int | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a backend says it is: the result of a backend probe. ``unusable`` counts what it lists that has no name by
    which it could be asked for (``model_list.py``)."""

    version: str | None
    catalog: tuple[ModelInfo, ...]
    loaded: tuple[LoadedModel, ...]
    parallel: int | None = None
    unusable: int = 0
    load: ServerLoad = ServerLoad()


class ParallelismSource(StrEnum):
    """Where it is known from how many requests a server runs at once, if mesh.yaml does not say it."""

    DURATIONS = "durations"
    """Learned from the durations in its answers (``balancer/limits.py``): it queues in silence what is too much."""
    PROBE = "probe"
    """Its probe says it (``Inventory.parallel``); unlimited where the probe does not."""


class ContinuationMethod(StrEnum):
    """How a server is told to go on with a chat of ``/v1`` that it, or another server, began."""

    TEMPLATE = "template"
    """As the last message of the assistant; where the model's template closes that, as text after the prompt that the
    server renders (Ollama)."""
    MARKED = "marked"
    """As the last message of the assistant, marked as the one to continue: else a new turn begins (vLLM)."""
    RENDERED_PROMPT = "rendered-prompt"
    """As text after the prompt that the server renders (llama-server)."""


class Dialect(Protocol):
    """One kind of server: what it can do, what is sent to it and what its answers mean. Pure.

    Each attribute is a capability. Code outside this room asks for the capability and never for the kind.
    ``DIALECTS`` in ``dialects.py`` holds one object for each kind.
    """

    label: str
    """The server's name in messages for people."""
    chat_path: str
    """Where ``build_chat_call`` goes."""
    has_model_store: bool
    """Whether models can be pulled, copied and deleted over its API."""
    parallelism: ParallelismSource
    continuation: ContinuationMethod
    required_probes: frozenset[str]
    """The names in ``probe_calls`` without whose answers there is no inventory."""
    latency_probe: str
    """The name in ``probe_calls`` of the cheapest one."""
    identity_probe: str
    """The name in ``probe_calls`` of the one whose answer ``recognizes`` reads."""
    is_generic: bool
    """Whether servers of other kinds would be recognized as this one, too."""
    usual_port: int | None
    """Where such a server listens unless it is told otherwise."""
    oldest_version: str | None
    """Older versions lack something that the mesh relies on."""
    update_hint: str | None
    """How to update a server that is older."""

    def serves(self, path: str) -> bool:
        """Whether it answers requests to this path of the gateway."""
        ...

    def recognizes(self, status: int, body: bytes) -> bool:
        """Whether this answer to ``identity_probe`` is such a server's, in whatever state that is."""
        ...

    def missing_model_hint(self, models: Sequence[str]) -> str:
        """What to do on its host when it lacks these models."""
        ...

    def build_chat_call(self, request: ChatRequest) -> HttpCall: ...

    def create_reader(self, *, stream: bool) -> FrameReader: ...

    def error_text(self, status: int, body: bytes) -> str:
        """The message of the server's error response, made safe to print, at most a line."""
        ...

    def probe_calls(self) -> Mapping[str, HttpCall]:
        """What to GET to learn the inventory, by name; ``read_inventory`` takes the answers by the same names."""
        ...

    def read_inventory(self, answers: ProbeAnswers) -> Inventory:
        """Raises ProbeError (finding ``wrong-server``) when the answers are not of this kind of server."""
        ...
