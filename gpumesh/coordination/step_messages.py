"""The messages between a gateway and the script in ``lua/``: a ``StepRequest`` goes there, a ``StepReply`` comes back.

Both are MessagePack. What Redis sends is hostile until it is decoded here: decoding checks each type.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Annotated

import msgspec

NO_LIMIT = -1
DO_NOT_ASK = -1  # as ``facts_version``: the facts of others are not wanted this time

Count = Annotated[int, msgspec.Meta(ge=0)]


class Standing(IntEnum):
    """What a gateway may do with a key: ask for places, take them without asking, or wait until the owner shares."""

    SHARED = 0
    OWN = 1
    OWNED_BY_OTHER = 2


class MailKind(StrEnum):
    """``GRANT``: a waiting request got a place. ``SHARE``: another gateway wants to use a key of this owner.
    ``SHARED``: the owner has shared the key. ``SYNC``: a gateway has gone, so places may be free."""

    GRANT = "grant"
    SHARE = "share"
    SHARED = "shared"
    SYNC = "sync"


class StepPlaceRequest(msgspec.Struct, frozen=True, array_like=True):
    """A request that takes or waits. ``client`` is a hash. ``waited_s``: since when it waits. ``cost`` is in weighted
    tokens."""

    rank: int
    client: str
    limit: int
    waited_s: float
    cost: float


class StepCharge(msgspec.Struct, frozen=True, array_like=True):
    """A correction of what a client was charged."""

    rank: int
    client: str
    tokens: float


class StepKey(msgspec.Struct, frozen=True):
    """What a gateway says of a key. ``held`` are all its places now, without those that it asks for (``takes``);
    ``heads`` are its best waiting requests. ``idle_s``: the seconds since it last used the key. ``gives_up``: it does
    not use the key alone any more."""

    key: str
    held: int
    takes: list[StepPlaceRequest]
    heads: list[StepPlaceRequest]
    charges: list[StepCharge]
    idle_s: float
    gives_up: bool


class StepRequest(msgspec.Struct, frozen=True):
    """``session`` grows with each registration of this gateway. ``seen`` is the number of the newest mail that was
    received. ``facts`` are pairs of topic and text, an empty text removes a fact. A gateway that is silent for
    ``dead_s`` is dead; ``share_s`` after the last use by another gateway a key may be used alone."""

    gateway: str
    session: int
    dead_s: float
    share_s: float
    registers: bool = False
    leaves: bool = False
    seen: int = 0
    keys: list[StepKey] = []
    messages: list[tuple[str, str]] = []
    facts: list[tuple[str, str]] = []
    facts_version: int = DO_NOT_ASK


class Mail(msgspec.Struct, frozen=True, array_like=True):
    """``number`` counts the mail of one session. ``rank`` is the class of the request that got a place; ``others``
    then are the places of the other gateways."""

    number: Count
    kind: MailKind
    key: str
    rank: Count
    others: Count


class KeyReply(msgspec.Struct, frozen=True, array_like=True):
    """The answer to one ``StepKey``. ``others``: the places of the other gateways. ``others_wait``: whether requests of
    theirs wait. ``granted``: one for each of ``takes``. ``grants``: the classes of the heads that got a place."""

    standing: Standing
    others: Count
    others_wait: bool
    granted: list[bool]
    grants: list[Count]


class StepReply(msgspec.Struct, frozen=True):
    """``is_known``: whether Redis knows this gateway; if not, the request had no effect. ``gateways`` are the other
    gateways that live. ``facts`` (gateway, topic, text) are those of all others, if they were asked for and
    ``facts_version`` has changed."""

    is_known: bool
    keys: list[KeyReply] = []
    mail: list[Mail] = []
    gateways: list[str] = []
    facts_version: int = DO_NOT_ASK
    facts: list[tuple[str, str, str]] = []


class PublishedMail(msgspec.Struct, frozen=True, array_like=True):
    """Mail as it comes by publish/subscribe, with the session for which it is meant."""

    session: int
    mail: Mail


class PublishedMessage(msgspec.Struct, frozen=True, array_like=True):
    """A message of another gateway, or of this one."""

    gateway: str
    topic: str
    text: str


encode_request = msgspec.msgpack.Encoder().encode
decode_reply = msgspec.msgpack.Decoder(StepReply).decode
decode_mail = msgspec.msgpack.Decoder(PublishedMail).decode
decode_message = msgspec.msgpack.Decoder(PublishedMessage).decode
