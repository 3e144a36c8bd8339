"""What is said over the control socket: JSON lines, one request on a connection, then replies until ``End`` or
``Error``. Closing the connection cancels the request.

New kinds and new fields may be added; a field that is not known is passed over, a kind that is not known is an Error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpumesh.backends.base import Chunk
from gpumesh.daemon.session import PromptRequest
from gpumesh.errors import ExitCode, GPUMeshError, ModelMissing, QueueFull, StreamCut
from gpumesh.mesh.history import History
from gpumesh.state import MeshState
from gpumesh.wire import from_json, to_json

# A prompt with images is some MB of base64; a line past this is not from a gpumesh.
LINE_LIMIT = 1 << 26

# -- requests --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GetStatus:
    """-> State."""


@dataclass(frozen=True, slots=True)
class Watch:
    """-> State, again after changes."""

    interval_s: float


@dataclass(frozen=True, slots=True)
class FirstReport:
    """-> State."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class Chat:
    """-> Route and Piece, the Route again whenever it changed."""

    ask: PromptRequest


@dataclass(frozen=True, slots=True)
class Exec:
    """-> Output."""

    node: str
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drain:
    """-> End."""

    node: str


@dataclass(frozen=True, slots=True)
class Resume:
    """-> End."""

    node: str


@dataclass(frozen=True, slots=True)
class Reconnect:
    """-> End."""

    node: str


@dataclass(frozen=True, slots=True)
class GetHistory:
    """-> Past."""


@dataclass(frozen=True, slots=True)
class Down:
    """-> State while it waits for what is in flight, ``drain_s`` at most; then the connection ends."""

    drain_s: float


ControlRequest = GetStatus | Watch | FirstReport | Chat | Exec | Drain | Resume | Reconnect | GetHistory | Down

# -- replies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class State:
    state: MeshState


@dataclass(frozen=True, slots=True)
class Past:
    history: History


@dataclass(frozen=True, slots=True)
class Route:
    node: str | None
    attempts: int


@dataclass(frozen=True, slots=True)
class Piece:
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Output:
    """``data`` is base64."""

    stream: str
    data: str
    ended: bool = False
    exit_status: int | None = None


@dataclass(frozen=True, slots=True)
class End:
    """The request is done, and was fine."""


@dataclass(frozen=True, slots=True)
class Error:
    """A GPUMeshError on its way to who asked. ``detail`` has what some kinds carry beside their text."""

    code: str
    message: str
    hint: str | None = None
    node: str | None = None
    exit_code: int = int(ExitCode.FAILED)
    detail: Mapping[str, Any] | None = None


ControlReply = State | Past | Route | Piece | Output | End | Error

_REQUESTS: Mapping[str, type[ControlRequest]] = {
    kind.__name__: kind
    for kind in (GetStatus, Watch, FirstReport, Chat, Exec, Drain, Resume, Reconnect, GetHistory, Down)
}
_REPLIES: Mapping[str, type[ControlReply]] = {
    kind.__name__: kind for kind in (State, Past, Route, Piece, Output, End, Error)
}


def encode_message(message: ControlRequest | ControlReply) -> bytes:
    """One line, with its end."""
    return json.dumps({"kind": type(message).__name__, **to_json(message)}).encode() + b"\n"


def decode_request(line: bytes) -> ControlRequest:
    """Raises ``ValueError``."""
    request: ControlRequest = _decode(line, _REQUESTS)
    return request


def decode_reply(line: bytes) -> ControlReply:
    """Raises ``ValueError``."""
    reply: ControlReply = _decode(line, _REPLIES)
    return reply


def _decode(line: bytes, kinds: Mapping[str, type[Any]]) -> Any:
    document = json.loads(line)
    if not isinstance(document, dict) or not isinstance(document.get("kind"), str) or document["kind"] not in kinds:
        raise ValueError("not a message that this gpumesh knows; is the running mesh of another version?")
    return from_json(kinds[document["kind"]], document)


# -- errors ----------------------------------------------------------------------------------------------------------


class RemoteError(GPUMeshError):
    """An error of a kind that holds more than its text, as told by the running mesh: same code, same exit code."""

    def __init__(self, told: Error) -> None:
        super().__init__(told.message, hint=told.hint, node=told.node)
        self.code = told.code  # type: ignore[misc]  # a class variable elsewhere; here each instance has its own
        try:
            self.exit_code = ExitCode(told.exit_code)  # type: ignore[misc]
        except ValueError:
            self.exit_code = ExitCode.FAILED  # type: ignore[misc]


def message_from_error(error: GPUMeshError) -> Error:
    detail: dict[str, Any] | None = None
    if isinstance(error, QueueFull):
        detail = {"retry_after_s": error.retry_after_s}
    elif isinstance(error, ModelMissing):
        detail = {"model": error.model, "available": list(error.available)}
    return Error(error.code, error.message, error.hint, error.node, int(error.exit_code), detail)


def error_from_message(told: Error) -> GPUMeshError:
    """The error as its own type where someone may act on that type."""
    detail = told.detail or {}
    if told.code == QueueFull.code and isinstance(detail.get("retry_after_s"), (int, float)):
        return QueueFull(told.message, retry_after_s=float(detail["retry_after_s"]))
    if told.code == ModelMissing.code and isinstance(detail.get("model"), str):
        available = tuple(str(name) for name in detail.get("available") or ())
        return ModelMissing(detail["model"], available=available, hint=told.hint)
    if told.code == StreamCut.code:
        return StreamCut(told.message, hint=told.hint, node=told.node)
    return RemoteError(told)
