"""``Dialect``, the protocol for one kind of server, and the values that every dialect reads and writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Protocol

import msgspec
from msgspec.structs import replace

from gpumesh.backends import safe_json
from gpumesh.state import LoadedModel, ModelInfo

# Larger figures of a server for one answer are not believed: the balancer learns from these figures, and the totals of
# pools add them up.
MOST_TOKENS = 1 << 27
LONGEST_MS = 30 * 86400 * 1000.0  # 30 days
FASTEST_TOKENS_PER_S = 100_000.0
# So many frames of a stream hold no text: the role, the reason for the end, and the mark of the end.
FRAMES_WITHOUT_TEXT = 3


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat. ``images`` are base64."""

    role: str
    content: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat, in no server's dialect. ``options`` have Ollama's names (``temperature``, ``num_predict``, ``num_ctx``
    …). ``think`` turns the model's thinking on or off, or names its effort, such as ``high``; ``None`` leaves this to
    the server."""

    model: str
    messages: tuple[Message, ...]
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    stream: bool = True
    think: bool | str | None = None


class HttpCall(msgspec.Struct, frozen=True):
    """A request to a backend. ``path`` is appended to the base URL; ``body`` is JSON."""

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class ServerCounters(msgspec.Struct, frozen=True, gc=False):
    """The server's own figures for one answer. Durations are in ms. ``None``: the server did not give this figure.

    ``tokens`` counts the tokens of the answer, ``prompt_tokens`` all tokens of the prompt. ``cached_tokens`` of the
    prompt's tokens were in the server's cache, so that the server did not read them again.

    ``total_ms`` is the time of the whole request inside the server. Parts of it are ``load_ms`` (the wait until the
    model was in memory), ``prompt_ms`` (the reading of the prompt) and ``eval_ms`` (the generation of the answer).
    """

    prompt_tokens: int | None = None
    tokens: int | None = None
    total_ms: float | None = None
    load_ms: float | None = None
    prompt_ms: float | None = None
    eval_ms: float | None = None
    cached_tokens: int | None = None

    def with_frame_count(self, frames: int) -> ServerCounters:
        """These counters. If they lack the number of the answer's tokens, they get the number of ``frames`` of the
        stream, less the frames that hold no text: a frame is about one token."""
        tokens = frames - FRAMES_WITHOUT_TEXT
        if self.tokens is not None or tokens <= 0:
            return self
        return replace(self, tokens=tokens)

    @property
    def tokens_per_s(self) -> float | None:
        """Generation rate by the server's own clock; ``None`` if it is not known, or so high that no hardware reaches
        it."""
        seconds = (self.eval_ms or 0.0) / 1000.0
        if self.tokens is None or not seconds:
            return None
        # The bound is compared by a product, because a division by tiny ``seconds`` could give infinity.
        is_possible = self.tokens <= FASTEST_TOKENS_PER_S * seconds
        return self.tokens / seconds if is_possible else None

    @property
    def waited_ms(self) -> float | None:
        """The time that the request waited inside the server, in ms; ``None`` if the server gave no durations, or a
        generation that is too short for its tokens. It is the part of the total that no other duration covers
        (docs/internals/ollama.md)."""
        if self.total_ms is None or self.eval_ms is None:
            return None
        if self.tokens is not None and self.tokens > 1 and self.tokens * 1000.0 > FASTEST_TOKENS_PER_S * self.eval_ms:
            return None  # otherwise most of the generation would count as a wait
        return max(self.total_ms - (self.load_ms or 0.0) - (self.prompt_ms or 0.0) - self.eval_ms, 0.0)

    def with_prompt_counts_of(self, earlier: ServerCounters | None) -> ServerCounters:
        """These counters. If they lack the prompt's tokens, they get its two counts from ``earlier`` counters of the
        same answer: Anthropic's streams count the prompt in their first event, and the answer in their last."""
        if self.prompt_tokens is not None or earlier is None:
            return self
        return replace(self, prompt_tokens=earlier.prompt_tokens, cached_tokens=earlier.cached_tokens)


def token_count(value: Any) -> int | None:
    """A server's number of tokens; ``None`` for a value that cannot be such a number."""
    return safe_json.as_bounded_count(value, MOST_TOKENS)


def duration_ms(value: Any, *, per_ms: float = 1.0) -> float | None:
    """A server's duration in ms; ``None`` for a value that cannot be a duration.

    ``per_ms``: how many of the server's units make one millisecond.
    """
    number = safe_json.as_number(value)
    if number is None:
        return None
    milliseconds = number / per_ms
    return milliseconds if milliseconds <= LONGEST_MS else None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. Only the final chunk is ``done``. It also has ``counters`` and ``done_reason``, as far as
    the server gave them."""

    text: str = ""
    thinking: str = ""
    done: bool = False
    done_reason: str | None = None
    counters: ServerCounters | None = None


ProbeAnswers = Mapping[str, tuple[int, bytes] | None]
"""Status and body, by the names of ``Dialect.probe_calls``; ``None`` for a call that got no answer."""


def successful_body(answer: tuple[int, bytes] | None) -> bytes:
    """The body of a probe's answer with status 200; empty for any other status, and if there is no answer."""
    if answer is None:
        return b""
    status, body = answer
    return body if status == 200 else b""


JSON_HEADERS = (("Content-Type", "application/json"),)


class FrameReader(Protocol):
    """Turns a response body's bytes into chunks, wherever the network cut the bytes.

    Raises BackendError for an error frame in mid-stream, and ProbeError (finding ``wrong-server``) for bytes that are
    not a frame.
    """

    def feed(self, data: bytes) -> Sequence[Chunk]:
        """The chunks that are complete after these bytes."""
        ...

    def close(self) -> Sequence[Chunk]:
        """The last chunks, at the end of the stream. Raises StreamCut when the final frame never came."""
        ...


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """The server's own figures of its load, with the requests of all its clients. ``None``: the server gives no figure.

    ``running`` and ``waiting`` count requests. ``kv_cache_pct`` is the used share of the memory for contexts, in %.
    """

    running: int | None = None
    waiting: int | None = None
    kv_cache_pct: int | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """The result of a backend probe: the server's own description of itself.

    ``catalog`` are the models that the server lists, ``loaded`` the models in memory. ``parallel`` is how many requests
    the server runs at once; ``None`` if it does not say. ``unusable`` counts the listed models whose name no request
    could use (``model_list.py``).
    """

    version: str | None
    catalog: tuple[ModelInfo, ...]
    loaded: tuple[LoadedModel, ...]
    parallel: int | None = None
    unusable: int = 0
    load: ServerLoad = ServerLoad()


class ParallelismSource(StrEnum):
    """How the mesh learns how many requests a server runs at once, if mesh.yaml does not give the number."""

    DURATIONS = "durations"
    """From the durations in the server's answers (``balancer/limits/``): the server queues requests without a
    sign."""
    PROBE = "probe"
    """From the probe (``Inventory.parallel``). If the probe does not give the number, it is unlimited."""


class ContinuationMethod(StrEnum):
    """How the mesh tells a server to continue an answer of a ``/v1`` chat that this server, or another one, began.

    In each case: if a server renders no prompt, it is only used if it is known how it treats a last message of the
    assistant."""

    TEMPLATE = "template"
    """The partial answer is text after the prompt that Ollama renders."""
    MARKED = "marked"
    """The partial answer is the last message of the assistant. The request marks it as the message to continue: without
    the mark a new turn begins (vLLM)."""
    RENDERED_PROMPT = "rendered-prompt"
    """The partial answer is text after the prompt that llama-server renders."""
    FOUND_OUT = "found-out"
    """The server may be any of these. If it renders a prompt as Ollama does, it is one; otherwise the message is
    marked."""


class Dialect(Protocol):
    """One kind of server: its capabilities, the requests to it, and the meaning of its answers. Pure.

    Each attribute is a capability. Code outside this room asks for the capability and never for the kind.
    ``DIALECTS`` in ``dialects.py`` holds one object for each kind.
    """

    label: str
    """The server's name in messages for people."""
    chat_path: str
    """The path of the request that ``build_chat_call`` makes."""
    has_exact_names: bool
    """Whether the server knows a model only under the very name that it lists. Ollama knows other spellings too."""
    has_model_store: bool
    """Whether the server's API can pull, copy and delete models."""
    parallelism: ParallelismSource
    continuation: ContinuationMethod
    required_probes: frozenset[str]
    """Names in ``probe_calls``. ``read_inventory`` needs the answers to all of these."""
    latency_probe: str
    """The name in ``probe_calls`` of the cheapest call."""
    identity_probe: str
    """The name in ``probe_calls`` of the call whose answer ``recognizes`` reads."""
    is_generic: bool
    """Whether ``recognizes`` also accepts the answers of servers of other kinds."""
    usual_port: int | None
    """The port on which such a server listens by default."""
    oldest_version: str | None
    """Versions before this one lack something that the mesh relies on."""
    update_hint: str | None
    """How to update a server that is older than ``oldest_version``."""

    def serves(self, path: str) -> bool:
        """Whether such a server answers requests to this path of the gateway."""
        ...

    def recognizes(self, status: int, body: bytes) -> bool:
        """Whether this answer to ``identity_probe`` comes from such a server, ready or not."""
        ...

    def missing_model_hint(self, models: Sequence[str]) -> str:
        """The text that tells a person what to do on the server's host when the server lacks these models."""
        ...

    def build_chat_call(self, request: ChatRequest) -> HttpCall:
        """The HTTP request for a chat, in the server's dialect."""
        ...

    def create_reader(self, *, stream: bool) -> FrameReader:
        """A reader for one answer to ``build_chat_call``, streamed or in one piece."""
        ...

    def error_text(self, status: int, body: bytes) -> str:
        """The message of the server's error response: safe to print, one line at most."""
        ...

    def probe_calls(self) -> Mapping[str, HttpCall]:
        """The GET requests that give the inventory, by name. ``read_inventory`` takes the answers by the same names."""
        ...

    def read_inventory(self, answers: ProbeAnswers) -> Inventory:
        """The inventory from the answers to ``probe_calls``. Raises ProbeError (finding ``wrong-server``) when the
        answers come from another kind of server."""
        ...
