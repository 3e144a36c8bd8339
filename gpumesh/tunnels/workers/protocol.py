"""The messages between a supervisor and its worker process: JSON lines over a socket pair.

A worker has one connection. The supervisor first sends a ``ConnectRequest``. The worker answers with ``ConnectionInfo``
or ``Failed``, and later perhaps sends ``Lost``. After ``Failed`` or ``Lost`` the worker exits. When the socket ends,
the worker ends, also when the mesh was killed. The worker is forked with copies of the listening sockets, one for each
target in the same order. The supervisor keeps the originals, so that the ports outlive any worker.

Only ``ConnectRequest.secrets`` and ``Reply`` hold secrets, and the ``repr`` of neither type shows them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from gpumesh.topology import Target
from gpumesh.tunnels.transport import ConnectionInfo, ConnectRequest
from gpumesh.wire import from_json, to_json

# -- to the worker ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartCommand:
    """Run ``command`` (quoted already) on the host, and answer with ``OutputPiece`` messages and one ``Done``.

    ``stream``: send the output as it comes, without a limit of bytes. Otherwise send at most ``limit_bytes`` of stdout
    and of stderr, at the end. ``timeout_s``: end the command after this time; ``None``: it has no deadline.
    ``has_input``: the command reads the data of ``Input`` messages, and ends by itself when its input ends.
    ``window_bytes``: the command is a program (``Tunnel.open_program``). At most so many bytes of its output are sent
    before ``Credit`` comes for them, each ``Input`` is answered with ``InputTaken``, and the program is not ended for
    the sake of another command.
    """

    id: int
    command: str
    timeout_s: float | None
    limit_bytes: int
    stream: bool = False
    has_input: bool = False
    window_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """Send ``data`` (base64) to the input of the command ``id``, which was started with ``has_input``."""

    id: int
    data: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Credit:
    """``bytes`` more of the output of the program ``id`` may be sent, because as many were read."""

    id: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Kill:
    """End the command ``id`` on the host."""

    id: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Measure the round trip to the host, and answer with ``Pong``. Wait at most ``timeout_s`` for the host."""

    id: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Reply:
    """A person's answer to ``Prompt``; ``None``: no person is there, or the person declined."""

    id: int
    text: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Close:
    """End forwarded connections, commands and the connection, then exit."""


# -- from the worker -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failed:
    """The connection could not be made. ``code`` is a TunnelError's; ``message`` and ``hint`` are safe to print."""

    code: str
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection was up and has ended by itself. The fields are those of ``Failed``."""

    code: str
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class OutputPiece:
    """A piece of a command's output. ``stream`` is a value of ``OutputStream``; ``data`` is base64."""

    id: int
    stream: str
    data: str


@dataclass(frozen=True, slots=True)
class Done:
    """A command ended. ``error`` is set when the command could not be run, or took longer than its ``timeout_s``;
    ``hint``: what can be done about the error. Both are safe to print."""

    id: int
    exit_status: int | None
    truncated: bool = False
    error: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class InputTaken:
    """The data of one ``Input`` for the program ``id`` is on its way to the host."""

    id: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to ``Ping``. ``rtt_ms`` is ``None`` when the host did not answer in time."""

    id: int
    rtt_ms: float | None


@dataclass(frozen=True, slots=True)
class ForwardFailed:
    """The host opened no channel to a target. ``code`` is ``forwarding-forbidden`` (administratively prohibited) or
    ``backend-unreachable`` (nothing listens there)."""

    target: Target
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class PeerRefused:
    """Another user of this machine tried to use a local port. ``name`` is the user's name, if known; safe to print."""

    port: int
    uid: int
    name: str | None


@dataclass(frozen=True, slots=True)
class Prompt:
    """The host asks the user a question (keyboard-interactive), which the supervisor answers with ``Reply``.

    ``text`` is safe to print. ``echo``: the answer may be shown while the person types.
    """

    id: int
    text: str
    echo: bool


ToWorker = ConnectRequest | StartCommand | Input | Credit | Kill | Ping | Reply | Close
FromWorker = (
    ConnectionInfo | Failed | Lost | OutputPiece | Done | InputTaken | Pong | ForwardFailed | PeerRefused | Prompt
)

_TYPES_BY_NAME: Mapping[str, type[ToWorker] | type[FromWorker]] = {
    message_type.__name__: message_type for message_type in (*get_args(ToWorker), *get_args(FromWorker))
}


def encode_message(message: ToWorker | FromWorker) -> bytes:
    """One line of JSON, with its newline."""
    # ASCII, because a file's name may hold bytes that are no text: lone surrogates in Python, which JSON escapes.
    return json.dumps({"kind": type(message).__name__, **to_json(message)}).encode("ascii") + b"\n"


def decode_message(line: bytes) -> ToWorker | FromWorker:
    """The message in a line that ``encode_message`` wrote. Raises ``ValueError`` for any other line."""
    try:
        document = json.loads(line)
    except RecursionError as error:
        raise ValueError("a line that is nested beyond all bounds") from error
    type_name = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(type_name, str) or type_name not in _TYPES_BY_NAME:
        raise ValueError("not a message between a supervisor and a worker")
    return from_json(_TYPES_BY_NAME[type_name], document)
