"""The outermost members of a request's JSON object, found without building what they hold. Pure.

The gateway must know a few small members (model, options, …) of bodies that may be 256 MiB. To build the whole costs
up to 30 times its size, and seconds in which nobody else is served. For 64 MiB (``benchmarks/bodies.py``, ms of CPU):

===================  ============  =================  ========================  =======================
body                 json.loads    msgspec, skipping  here, in pieces together  the longest of them
===================  ============  =================  ========================  =======================
an image as base64   120           16                 37                        0.1
a long prompt        131           16                 179                       0.1
messages of 2 bytes  1,027         43                 404                       0.5
``[],[],[],…``       4,522         132                343                       0.9
===================  ============  =================  ========================  =======================

So a small body is read by msgspec in one call, which skips what is not asked for without making objects of it, and
checks it all the same. A larger one is skipped over in pieces, between which others have their turn. That scanner
finds the end of each outermost value by its quotation marks and brackets, and leaves it to the server to complain of
what else is wrong inside of a value: a document that a server accepts is read here as that server reads it.

**One reading.** What is balanced on must be what the server reads, and servers differ: Go's ``encoding/json``, which is
Ollama's, takes ``Model`` for ``model``, the last of two, and merges two ``options``; Python's takes ``model`` alone,
and the last of two. So a member that Ollama knows stands once, however it is written, or the body is refused; and it
is passed on with the name that every server knows. ``tests/gateway/test_json_members.py`` has the table of what Go
says.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Generator, Iterable, Sequence
from io import BytesIO
from itertools import accumulate
from typing import Protocol, TypeVar

import msgspec

from gpumesh.gateway.http.errors import BadRequest

WHOLE_BYTES = 32 << 10  # read in one call: 7 ms at the worst, which is one of thousands of members
WINDOW = 16 << 10  # bytes of a larger one that are looked at in one go, 3 ms at the worst
FIRST_WINDOW = 1 << 10  # of a nested value: most are short
MAX_MEMBERS = 1000
MAX_DEPTH = 10_000  # as Go's encoding/json has it, the outermost object counted
NAME_BYTES = 256  # of a key as it is written; longer ones are none that anybody knows
TEXT_BYTES = 4 << 10  # of a member that is taken for a name
COLLAPSES = 64  # pairs that close at once are taken out so many times: mountains that are higher are looked at
COPIED = 1 << 20  # bytes in one go

# All that Ollama reads from the outermost object of any route, and what else is read here or for a continuation.
_OF_OLLAMA = """
    model name messages prompt suffix system template context stream raw format keep_alive images tools options think
    truncate shift logprobs top_logprobs input dimensions _debug_render_only
    max_tokens max_completion_tokens max_output_tokens stream_options seed stop temperature frequency_penalty
    presence_penalty top_p top_k response_format reasoning reasoning_effort n functions grammar json_schema guided_json
    guided_regex encoding_format stop_sequences tool_choice thinking metadata output_config
    background conversation include instructions text truncation
    source destination insecure username password verbose from files adapters draft_files quantize quantization
    draft_quantize license parameters renderer parser requires info remote_host
"""
KNOWN_MEMBERS = frozenset(_OF_OLLAMA.split())

RawValue = bytes | memoryview | msgspec.Raw
T = TypeVar("T")


class _Name(str):
    """A key that equals no other, so that a mapping of them keeps what stands twice."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


_decode = msgspec.json.Decoder(dict[_Name, msgspec.Raw], dec_hook=operator.call).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode_text_or_null = msgspec.json.Decoder(str | None).decode


class Members:
    """``known``: the value of each member that Ollama knows, as it is written. ``has_common_spelling``: all of these
    are spelled as every server knows them. Raises BadRequest for one that stands twice."""

    __slots__ = ("_keys", "_pairs", "has_common_spelling", "known")

    def __init__(self, pairs: Iterable[tuple[str, RawValue]], keys: Sequence[RawValue] | None = None) -> None:
        """Names and values; ``keys`` are the names as they are written, where they are at hand."""
        self._pairs = pairs
        self._keys = keys
        self.known: dict[str, RawValue] = {}
        self.has_common_spelling = True
        for name, value in pairs:
            folded = name.lower()
            if folded not in KNOWN_MEMBERS and (folded.isascii() or (folded := fold_name(name)) not in KNOWN_MEMBERS):
                continue
            if folded in self.known:
                raise BadRequest(f"the request body has `{folded}` twice")
            self.known[folded] = value
            if folded != name:
                self.has_common_spelling = False

    def text(self, name: str) -> str | None:
        """``None``: it is not there, or null. Raises BadRequest for anything but text."""
        value = self.known.get(name)
        if value is None:
            return None
        if len(value) > TEXT_BYTES:
            raise BadRequest(f"{name} is too long")
        try:
            return _decode_text_or_null(value)
        except (msgspec.MsgspecError, ValueError) as error:  # half of a surrogate pair and no UTF-8 among them
            raise BadRequest(f"{name} is required, as a string") from error

    def render_pieces(self, **texts: str) -> list[RawValue]:
        """The object anew, with these texts in place of what it had, every known member in its common spelling."""
        out: list[RawValue] = []
        for name, text in texts.items():
            out += (b",", json.dumps(name).encode(), b":", json.dumps(text).encode())
        for position, (name, value) in enumerate(self._pairs):
            folded = fold_name(name)
            if folded in texts:
                continue
            if folded in KNOWN_MEMBERS:
                key: RawValue = json.dumps(folded).encode()
            else:
                key = json.dumps(str(name)).encode() if self._keys is None else self._keys[position]
            out += (b",", key, b":", value)
        return [b"{", *out[1:], b"}"]


def fold_name(name: str) -> str:
    """A name as Go compares it: without case, two signs of which have a third form (``encoding/json``, foldName)."""
    folded = name.lower()
    return folded if folded.isascii() else folded.replace("\u017f", "s")


class BodyOwner(Protocol):
    """The request whose body it is."""

    async def run_sliced(self, work: Generator[None, None, T]) -> T:
        """The result of something that takes long, done in pieces."""

    def reserve_memory(self, size: int) -> None:
        """So many bytes more are held for it. Raises QueueFull where there is no room."""

    def release_memory(self, size: int) -> None:
        """So many of them are held no longer."""


async def read_members(body: bytes, request: BodyOwner) -> Members:
    """Raises BadRequest for what is no JSON object, or what servers would read differently."""
    members = read_small_members(body)
    return await request.run_sliced(scan_members(body)) if members is None else members


async def rewrite_body(body: bytes, members: Members, request: BodyOwner, **texts: str) -> bytes:
    """The body with these texts among its members; nobody may keep the old one. Raises QueueFull where there is no
    room for both."""
    pieces = members.render_pieces(**texts)
    if len(body) <= COPIED:
        return b"".join(pieces)
    request.reserve_memory(len(body))
    anew = await request.run_sliced(join_pieces(pieces))
    request.release_memory(len(body))
    return anew


def read_small_members(body: bytes) -> Members | None:
    """``None``: it has to be read in pieces. Raises BadRequest."""
    if not body:
        raise BadRequest("missing request body")
    if len(body) > WHOLE_BYTES:
        return None
    try:
        found = _decode(body)
    except msgspec.ValidationError as error:
        raise BadRequest("the request body is not a JSON object") from error
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    if len(found) > MAX_MEMBERS:
        raise _too_many()
    return Members(found.items())


def scan_members(body: bytes) -> Generator[None, None, Members]:
    """Yields after each piece of work. Raises BadRequest."""
    pairs, keys = yield from _Scanner(body).members()
    if len(body) <= WHOLE_BYTES:
        _check(body)
    return Members(pairs, keys)


def join_pieces(pieces: Iterable[RawValue]) -> Generator[None, None, bytes]:
    """One body of these, in pieces of work."""
    out = BytesIO()
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), COPIED):
            out.write(view[start : start + COPIED])
            if len(view) > COPIED:
                yield
    return out.getvalue()  # not copied: it is the buffer's own


def _check(body: bytes) -> None:
    """That a small one, which msgspec did not take, is JSON as Go reads it: it may nest deeply, have half of a
    surrogate pair, or bytes that are no UTF-8."""
    try:
        json.loads(body.decode("utf-8", "replace"), parse_constant=_refuse, parse_int=str, parse_float=str)
    except RecursionError:
        pass
    except ValueError as error:
        raise _not_json(str(error)) from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is none of its values")


def _not_json(why: str) -> BadRequest:
    return BadRequest(f"the request body is not JSON: {why}")


def _too_many() -> BadRequest:
    return BadRequest(f"the request body has more than {MAX_MEMBERS} members")


_BLANKS = re.compile(rb"[ \t\n\r]*")
_TEXT = re.compile(rb'[^"\\\x00-\x1f]*(?:\\["\\/bfnrtu][^"\\\x00-\x1f]*)*')
_WORD = re.compile(rb"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_SQUARE = bytes.maketrans(b"{}", b"[]")
_BRACKETS = b"[]{}"
_NO_BRACKETS = bytes(set(range(256)).difference(_BRACKETS))
_OUTSIDE = bytes(set(b" \t\n\r,:-+.0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz").union(_BRACKETS))
_STEPS = [0] * 256
_STEPS[ord("[")], _STEPS[ord("]")] = 1, -1
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_Work = Generator[None, None, None]


class _Scanner:
    """Goes through a body once, at most WINDOW bytes between two yields."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._size = len(body)
        self._at = 0

    def members(self) -> Generator[None, None, tuple[list[tuple[str, RawValue]], list[RawValue]]]:
        body, view = self._body, memoryview(self._body)
        pairs: list[tuple[str, RawValue]] = []
        keys: list[RawValue] = []
        yield from self._blanks()
        if self._at == self._size:
            raise BadRequest("missing request body")
        self._expect(b"{")
        yield from self._blanks()
        more = body[self._at : self._at + 1] != b"}"
        while more:
            began = self._at
            yield from self._string()
            key = body[began : self._at] if self._at - began <= NAME_BYTES else b'""'
            keys.append(view[began : self._at])
            yield from self._blanks()
            self._expect(b":")
            yield from self._blanks()
            began = self._at
            yield from self._value()
            pairs.append((_name(key), view[began : self._at]))
            if len(pairs) > MAX_MEMBERS:
                raise _too_many()
            yield from self._blanks()
            more = body[self._at : self._at + 1] == b","
            if more:
                self._at += 1
                yield from self._blanks()
        self._expect(b"}")
        yield from self._blanks()
        if self._at != self._size:
            raise _not_json(f"something follows after it, at byte {self._at}")
        return pairs, keys

    def _expect(self, character: bytes) -> None:
        if self._body[self._at : self._at + 1] != character:
            raise self._wrong(f"no {character.decode()}")
        self._at += 1

    def _wrong(self, what: str) -> BadRequest:
        return _not_json("it ends too early" if self._at >= self._size else f"{what} at byte {self._at}")

    def _run(self, pattern: re.Pattern[bytes]) -> _Work:
        """Past all that fits this pattern, which is one of single bytes."""
        while True:
            until = self._at + WINDOW
            found = pattern.match(self._body, self._at, until)
            assert found is not None
            self._at = found.end()
            if self._at < until:
                return
            yield

    def _blanks(self) -> _Work:
        return self._run(_BLANKS)

    def _value(self) -> _Work:
        first = self._body[self._at : self._at + 1]
        if first == b'"':
            yield from self._string()
        elif first in (b"[", b"{"):
            yield from self._nested()
        else:
            began = self._at
            yield from self._run(_WORD)
            if self._at - began < WINDOW and _SCALAR.fullmatch(self._body, began, self._at) is None:
                raise self._wrong("no value")

    def _string(self) -> _Work:
        self._expect(b'"')
        while True:
            until = self._at + WINDOW
            found = _TEXT.match(self._body, self._at, until)
            assert found is not None
            self._at = found.end()
            if self._at >= self._size:
                raise self._wrong("")
            if self._body[self._at] == _QUOTE:
                self._at += 1
                return
            if self._at < until and not (self._body[self._at] == _BACKSLASH and self._at + 1 == until):
                raise self._wrong("no character of a string")
            yield

    def _nested(self) -> _Work:
        """Past an array or an object: window by window, of which all is taken out but the brackets outside of strings.
        Only in that where the value ends each bracket is looked at."""
        self._at += 1
        depth, window, in_string = 1, FIRST_WINDOW, False
        while True:
            piece = self._body[self._at : self._at + window]
            last = self._at + len(piece) == self._size
            if not last and (len(piece) - len(piece.rstrip(b"\\"))) % 2:
                piece = piece[:-1]  # an escape belongs to one window
            if b"\\" in piece:
                parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
            else:
                parts = piece.split(b'"')
            outside = b"".join(parts[1 if in_string else 0 :: 2])
            if outside.translate(None, _OUTSIDE):
                raise self._wrong("a character that belongs to no value, after what stands")
            brackets = outside.translate(_SQUARE, _NO_BRACKETS)
            after = _depth_after(brackets, depth)
            if after == 0:
                self._at = self._past(brackets, depth, in_string, self._at + len(piece))
                yield
                return
            if last:
                self._at = self._size
                raise self._wrong("")
            depth = after
            in_string ^= len(parts) % 2 == 0
            self._at += len(piece)
            window = min(window * 8, WINDOW)
            yield

    def _past(self, brackets: bytes, depth: int, in_string: bool, until: int) -> int:
        """Where the value ends, which does so before ``until``."""
        at = self._at
        if in_string:
            found = _TOKEN.match(b'"' + self._body[at:until])
            assert found is not None
            at += found.end() - 1
        left = list(accumulate(map(_STEPS.__getitem__, brackets), initial=depth)).index(0)
        for token in _TOKEN.finditer(self._body, at, until):
            if self._body[token.start()] != _QUOTE:
                left -= 1
                if not left:
                    return token.end()
        raise AssertionError("the brackets were counted")


def _depth_after(brackets: bytes, depth: int) -> int:
    """How deep it is after these square brackets; 0 where it came back to nothing in between. Raises BadRequest.

    Pairs that close at once are taken out, again and again: what is left closes what was open before, and opens what
    is open after. Of mountains that are too high for that only their feet are looked at."""
    rest = brackets
    if depth + brackets.count(b"[") < MAX_DEPTH:
        for _ in range(COLLAPSES):
            shorter = rest.replace(b"[]", b"")
            if len(shorter) == len(rest):
                break
            rest = shorter
    for start in range(0, len(rest), COLLAPSES):
        part = rest[start : start + COLLAPSES]
        closed = part.count(b"]")
        if closed < depth and depth + len(part) < MAX_DEPTH:
            depth += len(part) - 2 * closed
            continue
        for bracket in part:
            depth += _STEPS[bracket]
            if depth <= 0:
                return 0
            if depth >= MAX_DEPTH:
                raise _not_json(f"it nests more than {MAX_DEPTH} levels")
    return depth


def _name(key: bytes) -> str:
    """Empty for what no server would know: bytes that are no UTF-8, half of a surrogate pair."""
    try:
        return _decode_text(key)
    except (msgspec.MsgspecError, ValueError):
        return ""
