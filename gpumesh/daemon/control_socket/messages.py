"""The control socket's protocol: the kinds of requests and replies, and errors as messages.

A client sends one request on a connection, then the mesh sends replies until ``End`` or ``Error``. When the client
closes the connection, the request is cancelled. A message is a line of JSON (``framing.py``).

A new version may add kinds and fields: an unknown field is ignored, an unknown kind is answered with ``Error``. The
names of the classes and their fields are a part of the protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpumesh.backends.base import Chunk
from gpumesh.config.comparison import ConfigSnapshot
from gpumesh.config.live_changes import ReloadReport
from gpumesh.daemon.control_socket import framing
from gpumesh.daemon.sessions.session import PromptRequest
from gpumesh.errors import ConfigError, ExitCode, GPUMeshError, ModelMissing, Problem, QueueFull, StreamCut
from gpumesh.mesh.history import History
from gpumesh.mesh.outages.outage import Outage
from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import PoolPlan, PoolState
from gpumesh.state import MeshState
from gpumesh.wire import from_json, to_json

# -- requests --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GetStatus:
    """Reply: State."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Replies: State, and State again after changes, at most once in ``interval_s`` seconds."""

    interval_s: float


@dataclass(frozen=True, slots=True)
class FirstReport:
    """Reply: State, when each node has been probed once or has failed, or after ``timeout_s`` seconds."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class Chat:
    """Replies: Route, then Piece for each chunk; Route again whenever the node or the number of attempts changes.

    ``ask`` is the prompt; the protocol fixes this name.
    """

    ask: PromptRequest


@dataclass(frozen=True, slots=True)
class Exec:
    """Replies: Output for each chunk."""

    node: str
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drain:
    """No reply before ``End``."""

    node: str


@dataclass(frozen=True, slots=True)
class Resume:
    """No reply before ``End``."""

    node: str


@dataclass(frozen=True, slots=True)
class Hold:
    """Takes a node out of service for as long as the connection lasts. Reply: Held, when the node is out of service.

    When the client closes its side of the connection, or ends in any way, the mesh puts the node back into service.
    Then it closes the connection: with Error if the node could not be put back, else without a reply."""

    node: str
    outage: Outage


@dataclass(frozen=True, slots=True)
class Reconnect:
    """No reply before ``End``."""

    node: str


@dataclass(frozen=True, slots=True)
class GetHistory:
    """Reply: Past, the history of the last minute."""


@dataclass(frozen=True, slots=True)
class GetConfiguration:
    """Reply: Configuration."""


@dataclass(frozen=True, slots=True)
class Reload:
    """Reply: Reloaded."""


@dataclass(frozen=True, slots=True)
class PlanPool:
    """Reply: PlannedPool."""

    spec: PoolSpec


@dataclass(frozen=True, slots=True)
class StartPool:
    """Replies: PoolStates with the state of this pool, again after changes, until the pool is ready."""

    name: str


@dataclass(frozen=True, slots=True)
class StopPool:
    """No reply before ``End``."""

    name: str


@dataclass(frozen=True, slots=True)
class GetPools:
    """Reply: PoolStates, with all pools."""


@dataclass(frozen=True, slots=True)
class Down:
    """Replies: State while requests in flight end, for ``drain_s`` seconds at most. Then the mesh closes the connection
    without ``End``."""

    drain_s: float


ControlRequest = (
    GetStatus
    | Watch
    | FirstReport
    | Chat
    | Exec
    | Drain
    | Resume
    | Hold
    | Reconnect
    | GetHistory
    | GetConfiguration
    | Reload
    | PlanPool
    | StartPool
    | StopPool
    | GetPools
    | Down
)

# -- replies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class State:
    state: MeshState


@dataclass(frozen=True, slots=True)
class Past:
    history: History


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the mesh has read from its mesh.yaml. It has the names of the variables with secrets, and no secret."""

    snapshot: ConfigSnapshot


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload of mesh.yaml has done."""

    report: ReloadReport


@dataclass(frozen=True, slots=True)
class Held:
    """The node is out of service now."""


@dataclass(frozen=True, slots=True)
class Route:
    """The node that serves a chat, and the number of requests that were sent to nodes for this chat so far."""

    node: str | None
    attempts: int


@dataclass(frozen=True, slots=True)
class Piece:
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Output:
    """A chunk of a command's output. ``data`` is base64; ``stream`` is ``stdout`` or ``stderr``."""

    stream: str
    data: str
    ended: bool = False
    exit_status: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedPool:
    plan: PoolPlan


@dataclass(frozen=True, slots=True)
class PoolStates:
    pools: tuple[PoolState, ...]


@dataclass(frozen=True, slots=True)
class End:
    """The last reply to a request that succeeded."""


@dataclass(frozen=True, slots=True)
class Error:
    """The last reply to a request that failed: a GPUMeshError. ``detail`` holds the further fields that some kinds of
    error have."""

    code: str
    message: str
    hint: str | None = None
    node: str | None = None
    exit_code: int = int(ExitCode.FAILED)
    detail: Mapping[str, Any] | None = None


ControlReply = (
    State | Past | Configuration | Reloaded | Held | Route | Piece | Output | PlannedPool | PoolStates | End | Error
)

_REQUESTS: Mapping[str, type[ControlRequest]] = {
    kind.__name__: kind
    for kind in (
        *(GetStatus, Watch, FirstReport, Chat, Exec, Drain, Resume, Reconnect, GetHistory, GetConfiguration),
        *(Hold, Reload, PlanPool, StartPool, StopPool, GetPools, Down),
    )
}
_REPLIES: Mapping[str, type[ControlReply]] = {
    kind.__name__: kind
    for kind in (
        *(State, Past, Configuration, Reloaded, Held, Route, Piece, Output, PlannedPool, PoolStates, End, Error),
    )
}


def encode_message(message: ControlRequest | ControlReply) -> bytes:
    """Returns the message as one line, with its line feed."""
    return framing.encode_line(type(message).__name__, to_json(message))


def decode_request(line: bytes) -> ControlRequest:
    """Returns the request in a line. Raises ``ValueError`` or ``RecursionError`` when the line is no request."""
    request: ControlRequest = _decode(line, _REQUESTS)
    return request


def decode_reply(line: bytes) -> ControlReply:
    """Returns the reply in a line. Raises ``ValueError`` or ``RecursionError`` when the line is no reply."""
    reply: ControlReply = _decode(line, _REPLIES)
    return reply


def _decode(line: bytes, kinds: Mapping[str, type[Any]]) -> Any:
    """Returns the message in a line. ``kinds`` has the classes of the messages that are expected, by their names."""
    kind, document = framing.decode_line(line)
    if kind not in kinds:
        raise framing.unknown_message()
    return from_json(kinds[kind], document)


# -- errors ----------------------------------------------------------------------------------------------------------


class RemoteError(GPUMeshError):
    """An error from the running mesh whose type matters to no caller. It keeps the code and exit code of that error."""

    def __init__(self, message: Error) -> None:
        super().__init__(message.message, hint=message.hint, node=message.node)
        self.code = message.code  # type: ignore[misc]  # a class variable elsewhere; here each instance has its own
        try:
            self.exit_code = ExitCode(message.exit_code)  # type: ignore[misc]
        except ValueError:  # an exit code that only a newer version has
            self.exit_code = ExitCode.FAILED  # type: ignore[misc]


def message_from_error(error: GPUMeshError) -> Error:
    """Returns the error as a message, for ``error_from_message`` in another process. ``detail`` gets the fields that
    only this type of error has."""
    detail: dict[str, Any] | None = None
    if isinstance(error, QueueFull):
        detail = {"retry_after_s": error.retry_after_s}
    elif isinstance(error, ModelMissing):
        detail = {"model": error.model, "available": list(error.available)}
    elif isinstance(error, ConfigError):
        detail = {"problems": to_json(error.problems)}
    return Error(error.code, error.message, error.hint, error.node, int(error.exit_code), detail)


def error_from_message(message: Error) -> GPUMeshError:
    """Returns the error of a message: as its own type where a caller may act on that type, else as a RemoteError. A
    message without the fields that its type needs gives a RemoteError too."""
    detail = message.detail or {}
    if message.code == QueueFull.code and isinstance(detail.get("retry_after_s"), (int, float)):
        return QueueFull(message.message, retry_after_s=float(detail["retry_after_s"]))
    if message.code == ModelMissing.code and isinstance(detail.get("model"), str):
        available = tuple(str(name) for name in detail.get("available") or ())
        return ModelMissing(detail["model"], available=available, hint=message.hint)
    if message.code == ConfigError.code and "problems" in detail:
        try:
            return ConfigError(from_json(tuple[Problem, ...], detail["problems"]), hint=message.hint)
        except ValueError:
            return RemoteError(message)
    if message.code == StreamCut.code:
        return StreamCut(message.message, hint=message.hint, node=message.node)
    return RemoteError(message)
