"""The registry of dialects: one object for each kind of server, and what is asked of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from gpumesh.addresses import format_address, is_loopback
from gpumesh.backends import ollama, openai, safe_json
from gpumesh.backends.base import Dialect, ServerCounters
from gpumesh.backends.llamacpp import LlamacppDialect
from gpumesh.backends.ollama import OllamaDialect
from gpumesh.backends.openai import OpenAIDialect
from gpumesh.backends.vllm import VllmDialect
from gpumesh.topology import BackendKind, Target

# In the order in which a server is asked what it is: what all servers with OpenAI's API have in common comes last.
DIALECTS: Mapping[BackendKind, Dialect] = {
    BackendKind.OLLAMA: OllamaDialect(),
    BackendKind.LLAMACPP: LlamacppDialect(),
    BackendKind.VLLM: VllmDialect(),
    BackendKind.OPENAI: OpenAIDialect(),
}

# A request that one kind began is continued on kinds of the same API only: their streams differ.
_KINDS_BY_CHAT_PATH = {
    path: frozenset(kind for kind, dialect in DIALECTS.items() if dialect.chat_path == path)
    for path in {dialect.chat_path for dialect in DIALECTS.values()}
}
KINDS_WITH_MODEL_STORE = frozenset(kind for kind, dialect in DIALECTS.items() if dialect.has_model_store)
# Whose API the gateway's own routes to the nodes' model stores use.
MODEL_STORE_DIALECT: Dialect = DIALECTS[BackendKind.OLLAMA]

LAST_LINES = 16  # of an answer, among which its figures stand


def find_dialect(kind: str) -> Dialect | None:
    """The dialect of a kind by its name in mesh.yaml and in a node's state; ``None`` while the kind is not known."""
    return DIALECTS.get(kind)  # type: ignore[call-overload, no-any-return]  # a StrEnum's members are its strings


def kinds_that_serve(path: str) -> frozenset[BackendKind]:
    return frozenset(kind for kind, dialect in DIALECTS.items() if dialect.serves(path))


def kinds_that_continue(kind: BackendKind) -> frozenset[BackendKind]:
    """The kinds of server that can go on with a stream that this kind began."""
    return _KINDS_BY_CHAT_PATH[DIALECTS[kind].chat_path]


def find_counters(body: bytes) -> ServerCounters | None:
    """The server's figures from a whole answer or from one frame of any dialect; ``None`` if it holds none."""
    document = safe_json.parse_object(body)
    if document is None:
        # Only the last lines: a body of nothing but line ends would become a list of millions.
        for line in reversed(body.rsplit(b"\n", LAST_LINES)[-LAST_LINES:]):
            document = safe_json.parse_object(line.strip().removeprefix(b"data:"))
            if document is not None:
                break
        else:
            return None
    if "eval_count" in document or "total_duration" in document:
        return ollama.parse_counters(document)
    return openai.parse_counters(document) or _nested(document)


def _nested(document: Mapping[str, Any]) -> ServerCounters | None:
    """``response.completed`` of the responses API, ``message_start`` of Anthropic's."""
    for key in ("response", "message"):
        inner = document.get(key)
        if isinstance(inner, dict) and (found := openai.parse_counters(inner)) is not None:
            return found
    return None


@lru_cache(maxsize=1024)
def host_header(target: Target) -> str:
    """What to say as ``Host``: the place as its own host knows it. Ollama on loopback answers 403, without a word, to
    a name that is not its own; the port of our end of a tunnel is not its own either."""
    return format_address("127.0.0.1" if is_loopback(target.host) else target.host, target.port)
