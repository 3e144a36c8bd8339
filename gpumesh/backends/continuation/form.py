"""What a form of stream is, to ``continuation.Continuation``: how it is read, continued and ended. Pure.

From the source of Ollama and llama-server (shared facts: ollama-api.md, "Continuing a cut answer"): most templates
continue a last message of the assistant, so that the reply holds only the new text; those that close the turn are
continued as raw text after the prompt as the server itself renders it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gpumesh.backends import safe_json
from gpumesh.backends.base import HttpCall
from gpumesh.topology import BackendKind

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
class Said:
    """The pieces of text and of thinking, in order; empty ones left out."""

    texts: tuple[str, ...] = ()
    thoughts: tuple[str, ...] = ()


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


@dataclass(frozen=True, slots=True)
class Rest:
    """What to send for the rest of an answer, and the form that reads what comes of it: it translates each frame to
    one of the client's own stream."""

    call: HttpCall
    form: Form


class Form(Protocol):
    """``end`` ends a frame, ``mark`` is its most common spelling. ``keeps``: an answer of this form can be continued,
    so its text is worth keeping."""

    mark: bytes
    end: re.Pattern[bytes]
    keeps: bool

    def plain(self, frames: bytes) -> bool:
        """Whether these frames hold text and nothing else, so that none need be looked at in detail. Cheap."""

    def end_of_last(self, frames: bytearray, start: int) -> int:
        """Where the last frame that ends at or after ``start`` ends; 0 if none does."""

    def read(self, frame: bytes) -> Frame: ...

    def said(self, frames: bytes) -> Said:
        """What many plain frames say: as ``read`` gives it, for a tenth of its cost."""

    def refusal(self, request: Document) -> str | None:
        """Why an answer to this request cannot be continued rightly; ``None`` if it can."""

    def budget(self, request: Document) -> int | None:
        """How many tokens the client allows at most."""

    def templated(self, request: Document) -> bool:
        """Whether the model's template stands between this request and what the model reads."""

    def render_call(self, request: Document, thinking: str) -> HttpCall | None:
        """Asks an Ollama to render the prompt up to SENTINEL; ``None`` where the answer would tell nothing."""

    def raw_refusal(self, request: Document) -> str | None:
        """Why ``raw`` cannot do it rightly; ``None`` if it can."""

    def raw(self, request: Document, sofar: Sofar, prompt: str) -> Rest:
        """As text after the rendered prompt: for templates that close a message of the assistant."""

    def rest_refusal(self, request: Document, kind: BackendKind) -> str | None:
        """Why ``rest`` cannot do it rightly on this kind of server; ``None`` if it can."""

    def rest(self, request: Document, sofar: Sofar, kind: BackendKind) -> Rest:
        """As a last message of the assistant."""

    def translate(self, frame: Frame, sofar: Sofar) -> bytes:
        """A frame of a later attempt as one of the client's own stream, figures corrected; may be empty."""

    def close(self, reason: str, sofar: Sofar) -> bytes:
        """What is missing for an answer whose text is complete."""

    def error(self, message: str) -> bytes: ...


def with_answer(messages: list[Any], text: str, thinking_key: str, thinking: str) -> list[Any]:
    """The messages with the answer so far as the last: joined to the client's own, if it began the answer itself."""
    if began_by_client(messages):
        last = messages[-1]
        return [*messages[:-1], {**last, "content": last["content"] + text}]
    message = {"role": "assistant", "content": text}
    return [*messages, message | {thinking_key: thinking} if thinking else message]


def began_by_client(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "assistant" and isinstance(last.get("content"), str)


def strings(pattern: re.Pattern[bytes], frames: bytes) -> Said | None:
    """Every JSON string that the pattern finds, without taking the frames apart: a quotation mark inside of a string is
    escaped, so that a key is found nowhere but where it is one. ``None`` where that gives no strings."""
    found = safe_json.parse(b"[" + b",".join(pattern.findall(frames)) + b"]")
    return Said(tuple(filter(None, found))) if isinstance(found, list) else None


def said_by(pairs: Iterable[tuple[str, str]]) -> Said:
    """From the text and the thinking of each frame."""
    all_pairs = list(pairs)
    texts = tuple(text for text, _ in all_pairs if text)
    return Said(texts, tuple(thinking for _, thinking in all_pairs if thinking))


def note(sofar: Sofar) -> dict[str, int]:
    """What the last frame says of what happened."""
    return {"continued": sofar.cuts, "tokens_before": sofar.tokens}


def positive(value: Any) -> int | None:
    return safe_json.whole(value) or None
