"""What a supervisor and its worker process say to each other: JSON lines over a socket pair.

One worker lives for one connection: ``ConnectRequest`` comes first; the worker answers ``ConnectionInfo`` or
``Failed``, later perhaps ``Lost``, and after ``Failed`` or ``Lost`` it exits. When the socket ends, the worker ends:
however the mesh died. Listening sockets travel beside ``ConnectRequest`` as file descriptors (SCM_RIGHTS), one for each
target in its order, and stay the supervisor's, so that the ports outlive any worker.

Secrets stand only in ``ConnectRequest.secrets`` and ``Reply``, and neither type shows them in its ``repr``.
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
class Exec:
    """Run ``command`` (already quoted). ``stream``: send ``Output`` as it comes; else bounded and at the end."""

    id: int
    command: str
    timeout_s: float | None
    limit_bytes: int
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Kill:
    """End the command ``id`` on the host."""

    id: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask the host for a sign of life (an answered ``keepalive@openssh.com``) within ``timeout_s``."""

    id: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Reply:
    """A person's answer to ``Prompt``; ``None``: there is nobody, or they declined."""

    id: int
    text: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Close:
    """Close everything in order and exit."""


# -- from the worker -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failed:
    """The connection could not be made. ``code`` is that of a TunnelError; text and hint are safe to print."""

    code: str
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection was up and is gone."""

    code: str
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """A piece of a command's output. ``data`` is base64."""

    id: int
    stream: str
    data: str


@dataclass(frozen=True, slots=True)
class Done:
    """A command ended. ``error`` is set when it could not be run or timed out."""

    id: int
    exit_status: int | None
    truncated: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Pong:
    """``rtt_ms`` is ``None`` when no answer came in time."""

    id: int
    rtt_ms: float | None


@dataclass(frozen=True, slots=True)
class ForwardFailed:
    """The host refused to open a channel to a target: ``code`` is ``forwarding-forbidden`` (administratively
    prohibited) or ``backend-unreachable`` (nothing listens there)."""

    target: Target
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class PeerRefused:
    """Another user of this machine tried to use a local port. ``name``: of the user, safe to print, if it has one."""

    port: int
    uid: int
    name: str | None


@dataclass(frozen=True, slots=True)
class Prompt:
    """The host asks the user something (keyboard-interactive). ``text`` is safe to print."""

    id: int
    text: str
    echo: bool


ToWorker = ConnectRequest | Exec | Kill | Ping | Reply | Close
FromWorker = ConnectionInfo | Failed | Lost | Output | Done | Pong | ForwardFailed | PeerRefused | Prompt

_KINDS: Mapping[str, type[ToWorker] | type[FromWorker]] = {
    kind.__name__: kind for kind in (*get_args(ToWorker), *get_args(FromWorker))
}


def encode_message(message: ToWorker | FromWorker) -> bytes:
    """One line, with its end."""
    # In ASCII: a file's name may hold bytes that are no text, and come here as lone surrogates.
    return json.dumps({"kind": type(message).__name__, **to_json(message)}).encode("ascii") + b"\n"


def decode_message(line: bytes) -> ToWorker | FromWorker:
    """Raises ``ValueError`` for what ``encode_message`` cannot have written."""
    try:
        document = json.loads(line)
    except RecursionError as error:
        raise ValueError("a line that is nested beyond all bounds") from error
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError("not a message between a supervisor and a worker")
    return from_json(_KINDS[kind], document)
