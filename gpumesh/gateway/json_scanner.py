"""Finds the outermost members of a JSON object of any size in short steps, without building what they hold. Pure.

The scanner finds the end of each outermost value by its quotation marks and brackets. It leaves it to the server to
complain about what else is wrong inside a value. It never looks at more than ``WINDOW`` bytes between two yields.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from itertools import accumulate

import msgspec

from gpumesh.gateway.http.errors import BadRequest

WINDOW = 16 << 10  # bytes that are looked at in one step, 3 ms at the worst
FIRST_WINDOW = 1 << 10  # the first step of a nested value: most values are short
MAX_MEMBERS = 1000
MAX_DEPTH = 10_000  # the bound of Go's encoding/json, the outermost object counted
MAX_NAME_BYTES = 256  # of a member's name as it is written; no known name is longer
MAX_COLLAPSES = 64  # how often pairs of brackets that enclose nothing are taken out; deeper nests are walked through

Members = tuple[list[tuple[str, memoryview]], list[memoryview]]
"""Names and values in their order, and the names as they are written."""

_BLANKS = re.compile(rb"[ \t\n\r]*")
_STRING_PART = re.compile(rb'[^"\\\x00-\x1f]*(?:\\["\\/bfnrtu][^"\\\x00-\x1f]*)*')
_WORD = re.compile(rb"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_TO_SQUARE = bytes.maketrans(b"{}", b"[]")
_BRACKETS = b"[]{}"
_NO_BRACKETS = bytes(set(range(256)).difference(_BRACKETS))
_OUTSIDE_OF_STRINGS = bytes(
    set(b" \t\n\r,:-+.0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz").union(_BRACKETS)
)
_DEPTH_CHANGE = [0] * 256
_DEPTH_CHANGE[ord("[")], _DEPTH_CHANGE[ord("]")] = 1, -1
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_Steps = Generator[None, None, None]
_decode_string = msgspec.json.Decoder(str).decode


class JsonScanner:
    """Goes through a body once."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._view = memoryview(body)
        self._size = len(body)
        self._position = 0

    def scan_members(self) -> Generator[None, None, Members]:
        """Raises BadRequest for what is no JSON object, as far as it is looked at."""
        pairs: list[tuple[str, memoryview]] = []
        written_names: list[memoryview] = []
        yield from self._skip_blanks()
        if self._position == self._size:
            raise BadRequest("missing request body")
        self._expect(b"{")
        yield from self._skip_blanks()
        more = self._next_byte() != b"}"
        while more:
            written_name, value = yield from self._scan_member()
            written_names.append(written_name)
            pairs.append((_decode_name(written_name), value))
            if len(pairs) > MAX_MEMBERS:
                raise too_many_members_error()
            more = self._next_byte() == b","
            if more:
                self._position += 1
                yield from self._skip_blanks()
        self._expect(b"}")
        yield from self._skip_blanks()
        if self._position != self._size:
            raise not_json_error(f"something follows after it, at byte {self._position}")
        return pairs, written_names

    def _scan_member(self) -> Generator[None, None, tuple[memoryview, memoryview]]:
        """A member's name and value as they are written; the blanks after it are skipped."""
        start = self._position
        yield from self._skip_string()
        written_name = self._view[start : self._position]
        yield from self._skip_blanks()
        self._expect(b":")
        yield from self._skip_blanks()
        start = self._position
        yield from self._skip_value()
        value = self._view[start : self._position]
        yield from self._skip_blanks()
        return written_name, value

    def _next_byte(self) -> bytes:
        return self._body[self._position : self._position + 1]

    def _expect(self, character: bytes) -> None:
        if self._next_byte() != character:
            raise self._error_here(f"no {character.decode()}")
        self._position += 1

    def _error_here(self, what: str) -> BadRequest:
        return not_json_error(
            "it ends too early" if self._position >= self._size else f"{what} at byte {self._position}"
        )

    # -- skipping ------------------------------------------------------------------------------------------------

    def _skip_run(self, pattern: re.Pattern[bytes]) -> _Steps:
        """Past all bytes that fit this pattern, which is one of single bytes."""
        while True:
            window_end = self._position + WINDOW
            match = pattern.match(self._body, self._position, window_end)
            assert match is not None, "it matches nothing as well"
            self._position = match.end()
            if self._position < window_end:
                return
            yield

    def _skip_blanks(self) -> _Steps:
        return self._skip_run(_BLANKS)

    def _skip_value(self) -> _Steps:
        first = self._next_byte()
        if first == b'"':
            yield from self._skip_string()
        elif first in (b"[", b"{"):
            yield from self._skip_nested()
        else:
            start = self._position
            yield from self._skip_run(_WORD)
            if self._position - start < WINDOW and _SCALAR.fullmatch(self._body, start, self._position) is None:
                raise self._error_here("no value")

    def _skip_string(self) -> _Steps:
        self._expect(b'"')
        while True:
            window_end = self._position + WINDOW
            match = _STRING_PART.match(self._body, self._position, window_end)
            assert match is not None, "it matches nothing as well"
            self._position = match.end()
            if self._position >= self._size:
                raise self._error_here("")
            if self._body[self._position] == _QUOTE:
                self._position += 1
                return
            escape_at_end = self._body[self._position] == _BACKSLASH and self._position + 1 == window_end
            if self._position < window_end and not escape_at_end:
                raise self._error_here("no character of a string")
            yield

    def _skip_nested(self) -> _Steps:
        """Past an array or an object, window by window.

        Of each window only the brackets outside of strings are kept. They are walked through one by one only in the
        window in which the value ends."""
        self._position += 1
        depth, window, in_string = 1, FIRST_WINDOW, False
        while True:
            piece = self._body[self._position : self._position + window]
            is_last = self._position + len(piece) == self._size
            if not is_last and (len(piece) - len(piece.rstrip(b"\\"))) % 2:
                piece = piece[:-1]  # both bytes of an escape belong to one window
            brackets, quotes = self._find_brackets(piece, in_string=in_string)
            depth_after = _depth_after(brackets, depth)
            if depth_after == 0:
                self._position = self._find_end(brackets, depth, in_string, self._position + len(piece))
                yield
                return
            if is_last:
                self._position = self._size
                raise self._error_here("")
            depth = depth_after
            in_string ^= quotes % 2 == 1
            self._position += len(piece)
            window = min(window * 8, WINDOW)
            yield

    def _find_brackets(self, piece: bytes, *, in_string: bool) -> tuple[bytes, int]:
        """The brackets of this piece outside of strings, as square ones, and how many quotation marks it has."""
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        outside = b"".join(parts[1 if in_string else 0 :: 2])
        if outside.translate(None, _OUTSIDE_OF_STRINGS):
            raise self._error_here("a character that belongs to no value, after what stands")
        return outside.translate(_TO_SQUARE, _NO_BRACKETS), len(parts) - 1

    def _find_end(self, brackets: bytes, depth: int, in_string: bool, window_end: int) -> int:
        """Where the value ends, which does so before ``window_end``."""
        position = self._position
        if in_string:
            match = _STRING_OR_BRACKET.match(b'"' + self._body[position:window_end])
            assert match is not None, "it begins with a quotation mark"
            position += match.end() - 1
        left = list(accumulate(map(_DEPTH_CHANGE.__getitem__, brackets), initial=depth)).index(0)
        for token in _STRING_OR_BRACKET.finditer(self._body, position, window_end):
            if self._body[token.start()] != _QUOTE:
                left -= 1
                if not left:
                    return token.end()
        raise AssertionError("the brackets were counted")


def _depth_after(brackets: bytes, depth: int) -> int:
    """The depth after these square brackets; 0 where it came down to 0 in between. Raises BadRequest when too deep.

    Pairs that enclose nothing are taken out, again and again. What is left closes what was open before, and opens what
    is open after. What nests too deeply for that is walked through, but for parts that cannot reach depth 0."""
    rest = brackets
    if depth + brackets.count(b"[") < MAX_DEPTH:
        for _ in range(MAX_COLLAPSES):
            shorter = rest.replace(b"[]", b"")
            if len(shorter) == len(rest):
                break
            rest = shorter
    for start in range(0, len(rest), MAX_COLLAPSES):
        part = rest[start : start + MAX_COLLAPSES]
        closed = part.count(b"]")
        if closed < depth and depth + len(part) < MAX_DEPTH:
            depth += len(part) - 2 * closed
            continue
        for bracket in part:
            depth += _DEPTH_CHANGE[bracket]
            if depth <= 0:
                return 0
            if depth >= MAX_DEPTH:
                raise not_json_error(f"it nests more than {MAX_DEPTH} levels")
    return depth


def _decode_name(written: memoryview) -> str:
    """A member's name. Empty for what no server would know: long names, no UTF-8, half of a surrogate pair."""
    if len(written) > MAX_NAME_BYTES:
        return ""
    try:
        return _decode_string(written)
    except (msgspec.MsgspecError, ValueError):
        return ""


def not_json_error(reason: str) -> BadRequest:
    return BadRequest(f"the request body is not JSON: {reason}")


def too_many_members_error() -> BadRequest:
    return BadRequest(f"the request body has more than {MAX_MEMBERS} members")
