"""The registry of dialects: one object for each kind of server, and the questions that concern all kinds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypedDict

import msgspec

from gpumesh.backends import ollama, openai, safe_json
from gpumesh.backends.base import Dialect, ServerCounters
from gpumesh.backends.llamacpp import LlamacppDialect
from gpumesh.backends.ollama import OllamaDialect
from gpumesh.backends.openai import OpenAIDialect
from gpumesh.backends.vllm import VllmDialect
from gpumesh.text.addresses import format_address, is_loopback
from gpumesh.topology import BackendKind, Target

# ``probes/server_kind.py`` tries the kinds in this order. OPENAI is last: it would recognize
# llama-server and vLLM as well.
DIALECTS: Mapping[BackendKind, Dialect] = {
    BackendKind.OLLAMA: OllamaDialect(),
    BackendKind.LLAMACPP: LlamacppDialect(),
    BackendKind.VLLM: VllmDialect(),
    BackendKind.OPENAI: OpenAIDialect(),
}

# The kinds of server by the API that they speak. Only a kind with the same API can continue a stream that another kind
# began, because the streams of different APIs look different.
_KINDS_BY_CHAT_PATH = {
    path: frozenset(kind for kind, dialect in DIALECTS.items() if dialect.chat_path == path)
    for path in {dialect.chat_path for dialect in DIALECTS.values()}
}
KINDS_WITH_MODEL_STORE = frozenset(kind for kind, dialect in DIALECTS.items() if dialect.has_model_store)
# The gateway's own routes to the nodes' model stores use the API of this dialect.
MODEL_STORE_DIALECT: Dialect = DIALECTS[BackendKind.OLLAMA]

# So many of an answer's last lines are searched for its figures. These are in one of the last two or three lines, which
# blank lines may follow.
LAST_LINES = 16


def find_dialect(kind: str) -> Dialect | None:
    """The dialect of a kind, by the kind's name in mesh.yaml and in a node's state. ``None`` for any other text, such
    as ``auto``, the kind of a node whose server is not known yet."""
    return DIALECTS.get(kind)  # type: ignore[call-overload, no-any-return]  # a StrEnum's members are its strings


def kinds_that_serve(path: str) -> frozenset[BackendKind]:
    """The kinds of server that answer requests to this path of the gateway."""
    return frozenset(kind for kind, dialect in DIALECTS.items() if dialect.serves(path))


def kinds_that_continue(kind: BackendKind) -> frozenset[BackendKind]:
    """The kinds of server that can continue a stream that this kind began."""
    return _KINDS_BY_CHAT_PATH[DIALECTS[kind].chat_path]


class _CounterMembers(TypedDict, total=False):
    """The members of an answer, or of a frame, that hold the figures of any dialect."""

    eval_count: Any
    prompt_eval_count: Any
    total_duration: Any
    load_duration: Any
    prompt_eval_duration: Any
    eval_duration: Any
    usage: Any
    timings: Any
    response: Any
    message: Any


_decode_counter_members = msgspec.json.Decoder(_CounterMembers).decode


def _parse_counter_members(data: bytes) -> Mapping[str, Any] | None:
    """The members of a JSON object that hold figures; ``None`` if ``data`` is no object. The other members of a small
    answer are skipped, because to build them would take most of the time."""
    if len(data) <= safe_json.SMALL_BYTES:
        try:
            return _decode_counter_members(data)
        except (ValueError, RecursionError):
            pass  # ``parse_object`` may read it: msgspec refuses some documents, such as those with NaN
    return safe_json.parse_object(data)


def find_counters(body: bytes) -> ServerCounters | None:
    """The server's figures, from a whole answer or from one frame of any dialect; ``None`` if ``body`` holds none."""
    counters = ollama.find_usual_counters(body)
    if counters is not None:
        return counters
    document = _parse_counter_members(body)
    if document is None:
        document = _find_last_object(body)
    if document is None:
        return None
    if "eval_count" in document or "total_duration" in document:  # Ollama's names
        return ollama.parse_counters(document)
    return openai.parse_counters(document) or _find_nested_counters(document)


def _find_last_object(body: bytes) -> Mapping[str, Any] | None:
    """The last of the final ``LAST_LINES`` lines that is a JSON object, plain or after ``data:``; ``None`` if there is
    no such line."""
    # Only the last lines are split off: a body of nothing but line ends would become a list of millions.
    last_lines = body.rsplit(b"\n", LAST_LINES)[-LAST_LINES:]
    for line in reversed(last_lines):
        document = _parse_counter_members(line.strip().removeprefix(b"data:"))
        if document is not None:
            return document
    return None


def _find_nested_counters(document: Mapping[str, Any]) -> ServerCounters | None:
    """The figures that the event ``response.completed`` of the responses API has in its ``response``, or Anthropic's
    ``message_start`` in its ``message``; ``None`` if there are none."""
    for key in ("response", "message"):
        inner = document.get(key)
        counters = openai.parse_counters(inner) if isinstance(inner, dict) else None
        if counters is not None:
            return counters
    return None


def host_header(target: Target) -> str:
    """The ``Host`` header of a request to this server: the server's address as the server's own host knows it. Ollama
    on loopback answers 403, without a body, to any other name. The address of our end of a tunnel would be wrong,
    because it has another port."""
    return _host_header(target.host, target.port)


@lru_cache(maxsize=1024)
def _host_header(host: str, port: int) -> str:
    """Does the work of ``host_header``. Its arguments are found in the cache faster than a ``Target``."""
    return format_address("127.0.0.1" if is_loopback(host) else host, port)
