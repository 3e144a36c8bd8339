"""The messages with facts that gateways send to each other, as JSON. Pure.

Every field has a bound. A message that is too long, of an unknown kind or of another form is refused as a whole. A
field that is not known is passed over, so that a newer gateway can add fields.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated

import msgspec

# Limits against hostile messages.
MAX_CHARS = 64_000  # the longest text that ``Exchange.send`` takes
MAX_LEARNED_BYTES = 48_000  # of what was learned about one server: about 300 models
MAX_TEXT_CHARS = 100
MAX_SERVERS = 1000
MAX_COUNT = 1_000_000_000
MAX_MODEL_CHARS = 400
MAX_OPTIONS = 32
MAX_PROMPTS = 100
MAX_TIME = 4_102_444_800.0  # seconds since 1970: the year 2100

ServerId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
"""A server by a hash of what identifies it (``hash_server``)."""
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT_CHARS)]
Secret = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
OptionValue = Annotated[str, msgspec.Meta(max_length=MAX_TEXT_CHARS)] | int | float | bool | None
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Time = Annotated[float, msgspec.Meta(ge=0.0, le=MAX_TIME)]
"""Seconds since 1970, by the clock of the sending gateway's machine."""


class Presence(msgspec.Struct, frozen=True, tag="presence"):
    """A gateway lives. Sent each second.

    ``host`` is the name of its machine, ``since`` the time when it began. ``in_flight`` and ``queued`` count its
    requests. ``drained`` are the servers of the nodes that a person has drained at this gateway. ``prompt_secret`` is
    the secret with which it makes hashes of prompts (``prompts.py``).
    """

    host: Text
    pid: Count
    version: Text
    since: Time
    in_flight: Count
    queued: Count
    drained: Annotated[tuple[ServerId, ...], msgspec.Meta(max_length=MAX_SERVERS)] = ()
    prompt_secret: Secret | None = None


class ServerChange(msgspec.Struct, frozen=True, tag="server"):
    """A server has just failed at the gateway, or answers it again (``is_up``). Others check it, and do not believe
    the message."""

    server: ServerId
    is_up: bool


class LearnedQuestion(msgspec.Struct, frozen=True, tag="question"):
    """The gateway asks what others have learned about these servers. The value is the time of its own figures; 0 if it
    has none."""

    servers: Annotated[dict[ServerId, Time], msgspec.Meta(max_length=MAX_SERVERS)]


class LearnedFigures(msgspec.Struct, frozen=True, tag="learned"):
    """What the gateway has learned about a server. ``rates`` and ``limits`` are JSON, as ``mesh/learned_state.py``
    stores them; whoever takes them over reads them. ``server_version`` is the server's own; ``None``: not known."""

    server: ServerId
    learned_at: Time
    server_version: Text | None
    rates: msgspec.Raw
    limits: msgspec.Raw


class PlacedPrompt(msgspec.Struct, frozen=True, array_like=True):
    """A prompt that was sent to a server, so that its server has it in its cache. ``model``, ``context`` and
    ``options`` are the residency key. ``blocks`` are the hashes of the prompt's blocks, 8 bytes each; ``size`` is its
    length in bytes."""

    server: ServerId
    model: Annotated[str, msgspec.Meta(max_length=MAX_MODEL_CHARS)]
    context: Count | None
    options: Annotated[tuple[tuple[Text, OptionValue], ...], msgspec.Meta(max_length=MAX_OPTIONS)]
    size: Count
    blocks: bytes


class PlacedPrompts(msgspec.Struct, frozen=True, tag="prompts"):
    """Prompts of the last moment. ``prompt_secret`` is a hash of the secret with which their hashes were made."""

    prompt_secret: Secret
    prompts: Annotated[tuple[PlacedPrompt, ...], msgspec.Meta(max_length=MAX_PROMPTS)]


Message = Presence | ServerChange | LearnedQuestion | LearnedFigures | PlacedPrompts

_decoder = msgspec.json.Decoder(Message)


def encode(message: Message) -> str:
    return msgspec.json.encode(message).decode()


def decode(text: str) -> Message:
    """Reads a message of another gateway. Raises ValueError if it is none, or beyond a bound."""
    if len(text) > MAX_CHARS:
        raise ValueError("too long")
    try:
        message = _decoder.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if isinstance(message, LearnedFigures) and len(message.rates) + len(message.limits) > MAX_LEARNED_BYTES:
        raise ValueError("too many figures")
    return message


def hash_server(mesh: str, key: str) -> str:
    """The ``ServerId`` of a server. ``key`` identifies it (``mesh/sharing/server_keys.py``); it holds addresses, which
    do not leave this gateway."""
    return blake2b(
        f"{mesh}\0{key}".encode("utf-8", "surrogateescape"), digest_size=16, person=b"gpumesh-server"
    ).hexdigest()
