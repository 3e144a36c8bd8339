"""Reads and checks the outermost members of a request's JSON object, and renders the object with other values.

The gateway must know a few small members (model, options, …) of bodies that may be 256 MiB large. Building the whole
document would take up to 30 times its size in memory, and seconds in which no other request is served. For 64 MiB
(``benchmarks/bodies.py``, ms of CPU):

===================  ============  =================  ======================  ====================
body                 json.loads    msgspec, skipping  this module, all steps  its longest step
===================  ============  =================  ======================  ====================
an image as base64   120           16                 37                      0.1
a long prompt        131           16                 179                     0.1
messages of 2 bytes  1,027         43                 404                     0.5
``[],[],[],…``       4,522         132                343                     0.9
===================  ============  =================  ======================  ====================

So msgspec reads a small body in one call. It makes no objects of the members that are not needed, but checks their
syntax. A larger body is scanned in steps (``backends/json_scanner``), between which other requests have their turn.

**The gateway must read the same model as the server**, and servers differ. Ollama uses Go's ``encoding/json``, which
takes ``Model`` for ``model``, takes the last of two members with one name, and merges two ``options``. Python's parser
knows ``model`` only, and takes the last of two. So a body is refused if a member that Ollama knows occurs twice, in any
spelling. A known member is sent on in the spelling that every server knows. A table of Go's behaviour is in
``tests/gateway/test_json_members.py``.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Collection, Generator, Iterable, Sequence
from typing import Protocol, TypeVar

import msgspec

from gpumesh.backends.body_pieces import COPY_BYTES, Piece, join_pieces
from gpumesh.backends.json_scanner import (
    MAX_MEMBERS,
    JsonScanner,
    MalformedJson,
    not_json_error,
    too_many_members_error,
)
from gpumesh.gateway.http.errors import BadRequest

SMALL_BODY_BYTES = 32 << 10  # read in one call: 7 ms at the worst, for thousands of members
MAX_TEXT_BYTES = 4 << 10  # of a member whose value is read as a name

# All members that Ollama reads from the outermost object of any route, and the other members that the gateway reads,
# here or to continue an answer.
_KNOWN_NAMES = """
    model name messages prompt suffix system template context stream raw format keep_alive images tools options think
    truncate shift logprobs top_logprobs input dimensions _debug_render_only
    max_tokens max_completion_tokens max_output_tokens stream_options seed stop temperature frequency_penalty
    presence_penalty top_p top_k response_format reasoning reasoning_effort n functions grammar json_schema guided_json
    guided_regex encoding_format stop_sequences tool_choice thinking metadata output_config
    background conversation include instructions text truncation
    source destination insecure username password verbose from files adapters draft_files quantize quantization
    draft_quantize license parameters renderer parser requires info remote_host
"""
KNOWN_MEMBERS = frozenset(_KNOWN_NAMES.split())

RawValue = Piece
"""JSON as it is written in the body: a value, or a name with its quotation marks."""
T = TypeVar("T")


class _UniqueName(str):
    """A name that equals no other name, so that a dict keeps both of two equal names."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


# ``dec_hook`` makes a _UniqueName of each name: msgspec calls it with the class and the text.
_decode_object = msgspec.json.Decoder(dict[_UniqueName, msgspec.Raw], dec_hook=operator.call).decode
_decode_text_or_null = msgspec.json.Decoder(str | None).decode


class Members:
    """The outermost members of a body. Raises BadRequest if a known member occurs twice.

    - ``known``: the values of the members of ``KNOWN_MEMBERS``, as they are written, by name.
    - ``has_common_spelling``: all known names are spelled as every server knows them.
    """

    __slots__ = ("_pairs", "_written_names", "has_common_spelling", "known")

    def __init__(self, pairs: Iterable[tuple[str, RawValue]], written_names: Sequence[RawValue] | None = None) -> None:
        """``pairs`` are names and values. ``written_names`` are the names as they are written in the body, if the
        caller has them."""
        self._pairs = pairs
        self._written_names = written_names
        self.known: dict[str, RawValue] = {}
        self.has_common_spelling = True
        known = self.known
        for name, value in pairs:
            folded = name.lower()
            if folded not in KNOWN_MEMBERS and (folded.isascii() or (folded := fold_name(name)) not in KNOWN_MEMBERS):
                continue
            if folded in known:
                raise BadRequest(f"the request body has `{folded}` twice")
            known[folded] = value
            if folded != name:
                self.has_common_spelling = False

    def text(self, name: str) -> str | None:
        """The member's text; ``None`` if the member is missing or null. Raises BadRequest if it is no text, or too
        long."""
        value = self.known.get(name)
        if value is None:
            return None
        if len(value) > MAX_TEXT_BYTES:
            raise BadRequest(f"{name} is too long")
        try:
            return _decode_text_or_null(value)
        except ValueError as error:  # also half of a surrogate pair, and no UTF-8
            raise BadRequest(f"{name} is required, as a string") from error

    def find_unknown(self, names: Collection[str]) -> dict[str, RawValue]:
        """The values of the members with these names, none of which is in ``KNOWN_MEMBERS``. A name in another spelling
        (``Model``) is another name. If two members have the same name, the last counts."""
        return {str(name): value for name, value in self._pairs if str(name) in names}

    def render_pieces(self, **values: str | bytes) -> list[RawValue]:
        """The JSON object in pieces, to be joined to a body. ``values`` replace the members of these names, or are
        added, at the begin: a ``str`` as a text, ``bytes`` as JSON. Every known name gets its common spelling."""
        pieces: list[RawValue] = []
        for name, value in values.items():
            encoded_value = json.dumps(value).encode() if isinstance(value, str) else value
            pieces += (b",", json.dumps(name).encode(), b":", encoded_value)
        for index, (name, raw_value) in enumerate(self._pairs):
            folded = fold_name(name)
            if folded in values:
                continue
            if folded in KNOWN_MEMBERS:
                encoded_name: RawValue = json.dumps(folded).encode()
            elif self._written_names is None:
                encoded_name = json.dumps(str(name)).encode()
            else:
                encoded_name = self._written_names[index]
            pieces += (b",", encoded_name, b":", raw_value)
        return [b"{", *pieces[1:], b"}"]  # without the comma before the first member


def fold_name(name: str) -> str:
    """The form in which Go compares names (``encoding/json``, foldName): without case. Two letters have a third form:
    ``lower`` changes the Kelvin sign to ``k``, but does not change the long s."""
    folded = name.lower()
    return folded if folded.isascii() else folded.replace("\u017f", "s")


class BodyOwner(Protocol):
    """The request whose body is read, as far as the functions here use it."""

    async def run_sliced(self, work: Generator[None, None, T]) -> T:
        """Does long work in steps, and returns its result."""

    def reserve_memory(self, size: int) -> None:
        """Reserves ``size`` bytes more for the request. Raises QueueFull if there is no room."""

    def release_memory(self, size: int) -> None:
        """Frees ``size`` of the reserved bytes."""


async def read_members(body: bytes, request: BodyOwner) -> Members:
    """Reads the members of a body of any size. Raises BadRequest if the body is no JSON object, or if servers would
    read it differently."""
    members = read_small_members(body)
    if members is None:
        members = await request.run_sliced(scan_members(body))
    return members


async def rewrite_body(body: bytes, members: Members, request: BodyOwner, **values: str | bytes) -> bytes:
    """Returns a new body with ``values`` among its members (see ``render_pieces``), and with the common spelling of
    known names. The caller must not keep the old body: its memory is released. Raises QueueFull if there is no room for
    both bodies at once."""
    pieces = members.render_pieces(**values)
    if len(body) <= COPY_BYTES:  # small enough to be copied at once, and to be in memory twice for that time
        return b"".join(pieces)
    request.reserve_memory(len(body))
    new_body = await request.run_sliced(join_pieces(pieces))
    request.release_memory(len(body))
    return new_body


def read_small_members(body: bytes) -> Members | None:
    """Reads the members of a small body in one call. Returns ``None`` if the body must be scanned in steps: it is
    large, or msgspec cannot read it (Go can read bodies that msgspec refuses). Raises BadRequest if the body is empty,
    is no JSON object, or if servers would read it differently."""
    if not body:
        raise BadRequest("missing request body")
    if len(body) > SMALL_BODY_BYTES:
        return None
    try:
        document = _decode_object(body)
    except msgspec.ValidationError as error:  # it is JSON, but no object
        raise BadRequest("the request body is not a JSON object") from error
    except (ValueError, RecursionError):  # no JSON, as far as msgspec knows
        return None
    if len(document) > MAX_MEMBERS:
        raise BadRequest(str(too_many_members_error()))
    return Members(document.items())


def scan_members(body: bytes) -> Generator[None, None, Members]:
    """Reads the members of a body of any size, and yields after each step. Raises BadRequest as ``read_members``."""
    try:
        pairs, written_names = yield from JsonScanner(body).scan_members()
    except MalformedJson as error:
        raise BadRequest(str(error)) from error
    # The scanner does not see faults inside values. A small body is checked for them here, a larger body by the server.
    if len(body) <= SMALL_BODY_BYTES:
        _require_json(body)
    return Members(pairs, written_names)


def _require_json(body: bytes) -> None:
    """Raises BadRequest unless Go reads this small body, which msgspec refused. Go accepts bodies that nest deeply,
    that hold half of a surrogate pair, or that are no UTF-8."""
    try:
        # ``str`` keeps numbers as text: Python refuses to convert an integer of more than 4300 digits.
        json.loads(body.decode("utf-8", "replace"), parse_constant=_refuse_constant, parse_int=str, parse_float=str)
    except RecursionError:  # too deep for Python, but not for Go: the scanner has checked the depth
        pass
    except ValueError as error:
        raise BadRequest(str(not_json_error(str(error)))) from error


def _refuse_constant(constant: str) -> None:
    """Raises ValueError: Python's parser would read ``NaN`` and ``Infinity``, which are no JSON."""
    raise ValueError(f"{constant} is none of its values")
