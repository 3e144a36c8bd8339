"""Reads the print of a request's prompt from its body, and the hint that names its conversation. Pure.

Nothing is parsed: a prompt is the JSON of those members that the model reads, as they are written in the body, in the
order in which they are rendered: system, tools, messages. Two bodies of one client have the same beginning if their
prompts do, because a client writes its JSON in one way. Two clients need not match. Nothing of a prompt is kept but
hashes, with a key of this process (``balancer/prefixes/prints.py``).
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping

import msgspec

from gpumesh.balancer.prefixes import PromptHasher, PromptPrint
from gpumesh.gateway.body_parsers.json_members import Members, RawValue
from gpumesh.gateway.model_requests import ModelRoute

MAX_HINT_BYTES = 1024  # a longer value is no name of a conversation
MAX_METADATA_BYTES = 16 << 10  # room for 16 pairs of 512 characters, which is what the APIs allow
_EMPTY_VALUES = frozenset({b"null", b'""', b"[]", b"{}"})
_MAX_END_BYTES = 64  # so many bytes at a list's end are looked at: its bracket, and the blanks before it


class PromptReader:
    """Reads the prompts of all requests with one hasher, so that they can be compared."""

    __slots__ = ("_hasher",)

    def __init__(self, hasher: PromptHasher) -> None:
        self._hasher = hasher

    def read_prompt(self, route: ModelRoute, members: Members, key: Hashable) -> PromptPrint | None:
        """The print of the prompt of a small body, in one step. ``None`` if the prompt is shorter than one block, or if
        the route has no prompt that a server would keep. ``key``: the residency key (``base.ResidencyKey``)."""
        return self._hasher.hash_prompt(key, b"".join(_collect_pieces(route, members)))

    def scan_prompt(
        self, route: ModelRoute, members: Members, key: Hashable
    ) -> Generator[None, None, PromptPrint | None]:
        """The same as ``read_prompt``, for a body of any size. Yields after each step (``Request.run_sliced``)."""
        return self._hasher.hash_pieces(key, _collect_pieces(route, members))

    def read_session(self, headers: Mapping[str, str], members: Members) -> int | None:
        """The hash of the name of the request's conversation; ``None`` if the client gives none.

        The name is, in this order: ``X-GPUMesh-Session``; ``prompt_cache_key`` (OpenAI); ``metadata.user_id``
        (Anthropic: Claude Code puts its session there); ``user`` (OpenAI)."""
        header = headers.get("x-gpumesh-session")
        if header:
            return self._hasher.hash_text(b"header " + header.encode(errors="replace")[:MAX_HINT_BYTES])
        hints = members.find_unknown(_HINT_MEMBERS)
        metadata = members.known.get("metadata")
        name = (
            _read_name(hints.get("prompt_cache_key"))
            or (None if metadata is None else _read_user_id(metadata))
            or _read_name(hints.get("user"))
        )
        return None if name is None else self._hasher.hash_text(name)


_HINT_MEMBERS = ("prompt_cache_key", "user")


def _collect_pieces(route: ModelRoute, members: Members) -> list[RawValue]:
    """The parts of the prompt in their order, each after the name of its member between two zero bytes. JSON holds no
    zero byte, so a name cannot be mistaken for a part of a prompt.

    The last bracket or quotation mark of the last part is left out, with the blanks before it: the next prompt of the
    conversation goes on there. Example: ``["a"]`` becomes ``["a"``, with which ``["a", "b"]`` begins too."""
    pieces: list[RawValue] = []
    known = members.known
    for name in route.prompt_members:
        value = known.get(name)
        if value is None or (len(value) <= 4 and bytes(value) in _EMPTY_VALUES):  # 4: a long value is not copied
            continue
        pieces += (b"\0%b\0" % name.encode(), value)
    if pieces:
        last_value = memoryview(pieces[-1])
        end = bytes(last_value[-_MAX_END_BYTES:])
        if end[-1:] in (b"]", b'"'):
            shortened_end = end[:-1].rstrip(b" \t\r\n")
            pieces[-1] = last_value[: len(last_value) - len(end) + len(shortened_end)]
    return pieces


class _Metadata(msgspec.Struct, gc=False):
    """The part of ``metadata`` that names a conversation, as it is written."""

    user_id: msgspec.Raw = msgspec.Raw()


_decode_metadata = msgspec.json.Decoder(_Metadata).decode


def _read_user_id(metadata: RawValue) -> bytes | None:
    """The ``user_id`` in Anthropic's ``metadata``; ``None`` if there is none, or if the metadata cannot be read."""
    if len(metadata) > MAX_METADATA_BYTES:
        return None
    try:
        return _read_name(_decode_metadata(metadata).user_id)
    except (ValueError, RecursionError):  # no JSON object, or nested too deeply: the server will tell the client
        return None


def _read_name(value: RawValue | None) -> bytes | None:
    """A name as it is written in the body, with its quotation marks; ``None`` if it is no text, or empty, or too
    long."""
    if value is None or not 2 < len(value) <= MAX_HINT_BYTES:  # 2: the quotation marks of an empty text
        return None
    name = bytes(value)
    return name if name.startswith(b'"') else None
