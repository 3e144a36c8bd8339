"""Reads the answers of a node's Ollama to operations on its model store: steps of progress, documents, refusals.

The server may be hostile. So the code here limits the size of each answer, and makes its texts printable before they
become a part of a step or a message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gpumesh.backends import safe_json
from gpumesh.backends.dialects import MODEL_STORE_DIALECT
from gpumesh.backends.error_text import find_error_message
from gpumesh.backends.frames import LineSplitter
from gpumesh.backends.model_list import MAX_CONTEXT_TOKENS
from gpumesh.errors import BackendError, GPUMeshError, ProbeError
from gpumesh.text.printable import printable

MAX_LINE_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 20  # of an answer that is not a stream of progress
LINES_PER_TURN = 100  # after so many lines other tasks run: one piece of an answer can hold thousands of lines
MAX_STATUS_CHARS = 200
SUCCESS = "success"  # the status of the last step of an operation that is complete


class StoreAnswer(Protocol):
    """An answer: its HTTP status, and its body as an async iterator of bytes."""

    status: int

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def aclose(self) -> None:
        """Ends the request, even if the answer has not been read to its end."""
        ...


@dataclass(frozen=True, slots=True)
class StoreStep:
    """One line of progress. A line about a layer has its ``digest`` and its sizes in bytes; other lines have only a
    ``status``."""

    status: str
    digest: str | None = None
    completed_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class NodeResult:
    """The result of a request to one node. ``status`` is the server's HTTP status, and ``error_text`` its error
    message. If there is no answer, ``status`` is ``None``, and ``error`` says why."""

    node: str
    status: int | None
    error_text: str = ""
    error: GPUMeshError | None = None

    @property
    def done(self) -> bool:
        """Whether the server carried out the request."""
        return self.status is not None and self.status < 300

    @property
    def model_is_missing(self) -> bool:
        """Whether the server answered that it does not have the model."""
        return self.status == 404


class StoreRefusal(BackendError):
    """The server itself refuses or gives up the operation, so the same request again would not help. ``status``: the
    HTTP status; ``None`` if the refusal is a line of a stream that had begun."""

    def __init__(self, message: str, *, node: str, status: int | None = None) -> None:
        super().__init__(message, hint=_find_hint(message), node=node)
        self.status = status


def failed_result(node: str, error: GPUMeshError) -> NodeResult:
    """The result of a request to which no answer came, with the error as the reason."""
    return NodeResult(node, None, printable(error.message), error)


def answered_result(node: str, status: int, body: bytes) -> NodeResult:
    """The result of a request that was answered, with success or with an error."""
    return NodeResult(node, status, read_error_text(status, body))


def read_error_text(status: int, body: bytes) -> str:
    """The message of an error response, safe to print."""
    return MODEL_STORE_DIALECT.error_text(status, body)


async def read_body(answer: StoreAnswer) -> bytes | None:
    """The whole body; ``None`` if it is longer than ``MAX_DOCUMENT_BYTES``. Ends the request in any case."""
    body = bytearray()
    try:
        async for piece in answer:
            body += piece
            if len(body) > MAX_DOCUMENT_BYTES:
                return None
        return bytes(body)
    finally:
        await answer.aclose()


async def read_lines(answer: StoreAnswer, node: str) -> AsyncIterator[bytes]:
    """Yields the lines of the body; the last one may be empty. Raises BackendError for a line that is longer than
    ``MAX_LINE_BYTES``."""
    splitter = LineSplitter(MAX_LINE_BYTES)
    async for piece in answer:
        try:
            lines = splitter.feed(piece)
        except ProbeError as error:
            raise not_ollama_error(node) from error  # a line that is too long
        for number, line in enumerate(lines, 1):
            yield line
            if number % LINES_PER_TURN == 0:
                await asyncio.sleep(0)
    yield splitter.take_rest()  # empty if the body has ended with a line end


def parse_step(line: bytes, node: str) -> StoreStep | None:
    """The step of a line; ``None`` for a line without progress. Raises StoreRefusal for a line with an error."""
    entry = safe_json.parse_report(line)
    if entry is None:
        return None
    message = find_error_message(entry)
    if message is not None:
        raise StoreRefusal(message, node=node)
    status = safe_json.as_text(entry.get("status"))
    if status is None:
        return None
    status = printable(status, MAX_STATUS_CHARS)
    total = safe_json.as_count(entry.get("total"))
    if not total:  # None or 0: the line is not about a layer
        return StoreStep(status)
    digest = safe_json.as_text(entry.get("digest"))
    return StoreStep(
        status,
        None if digest is None else printable(digest, MAX_STATUS_CHARS),
        min(safe_json.as_count(entry.get("completed")) or 0, total),  # Ollama leaves ``completed`` out while it is 0
        total,
    )


def parse_document(status: int, body: bytes, node: str) -> dict[str, Any]:
    """The answer's JSON object; empty if the body is no JSON object. Raises StoreRefusal for an answer with an
    error."""
    if status >= 400:
        raise StoreRefusal(read_error_text(status, body), node=node, status=status)
    document = safe_json.parse_report(body) or {}
    message = find_error_message(document)
    if message is not None:
        raise StoreRefusal(message, node=node)
    return document


def parse_context_length(document: Mapping[str, Any]) -> int | None:
    """The context length in an answer of ``/api/show``, in tokens; ``None`` if the answer has none that can be
    believed. Its key in ``model_info`` begins with the model's architecture: ``qwen2.context_length``."""
    info = document.get("model_info")
    if not isinstance(info, dict):
        return None
    for key, value in info.items():
        if str(key).endswith(".context_length"):
            length = safe_json.as_bounded_count(value, MAX_CONTEXT_TOKENS)
            if length:
                return length
    return None


def not_ollama_error(node: str) -> BackendError:
    """The error for an answer that is too long to be Ollama's."""
    return BackendError("the server's answer is not what Ollama would say", node=node)


def _find_hint(message: str) -> str | None:
    """A hint for an error message of Ollama that has a known remedy; ``None`` for others."""
    if "no space left" in message:
        return "its disk is full: `gpumesh exec NODE -- df -h`, and `gpumesh models rm` what is not needed"
    if "file does not exist" in message:
        return "no such model in Ollama's library: look at https://ollama.com/library for its name and tags"
    return None
