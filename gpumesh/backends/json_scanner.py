"""Finds the outermost members of a JSON object of any size in short steps, without building their values. Pure.

The scanner finds the end of each outermost value by its quotation marks and brackets. It does not look for other faults
inside a value: the server refuses them. The scanner never reads more than ``WINDOW`` bytes between two yields.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from itertools import accumulate

import msgspec

WINDOW = 16 << 10  # bytes that are read in one step, 3 ms at the worst
FIRST_WINDOW = 1 << 10  # bytes of the first step in a nested value: most values are short
MAX_MEMBERS = 1000  # of the outermost object
MAX_DEPTH = 10_000  # the limit of Go's encoding/json; the outermost object counts
MAX_NAME_BYTES = 256  # of a member's name as it is written; no known name is longer
MAX_COLLAPSES = 64  # rounds in which empty pairs of brackets are removed; deeper nests are counted bracket by bracket
PART_BRACKETS = 64  # brackets that are counted together, if they cannot end the value

ScannedMembers = tuple[list[tuple[str, memoryview]], list[memoryview]]
"""The pairs of decoded name and value in their order, then the names as they are written in the body."""

_BLANKS = re.compile(rb"[ \t\n\r]*")
_STRING_PART = re.compile(rb'[^"\\\x00-\x1f]*(?:\\["\\/bfnrtu][^"\\\x00-\x1f]*)*')  # without the quotation marks
_WORD = re.compile(rb"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)  # the string may be cut
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


class MalformedJson(ValueError):
    """The body is no JSON object, or one with too many members. The text is a sentence for the client."""


class JsonScanner:
    """Scans one body, once. ``_position`` is the index of the next byte. All methods whose names begin with ``_skip``
    move it behind what they skip, yield after each window, and raise MalformedJson for a fault."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._view = memoryview(body)
        self._size = len(body)
        self._position = 0

    def scan_members(self) -> Generator[None, None, ScannedMembers]:
        """Yields after each step, then returns the members. Raises MalformedJson if the body is no JSON object, as far
        as the scanner checks that, or has too many members."""
        pairs: list[tuple[str, memoryview]] = []
        written_names: list[memoryview] = []
        yield from self._skip_blanks()
        if self._position == self._size:
            raise MalformedJson("missing request body")
        self._expect(b"{")
        yield from self._skip_blanks()
        has_more = self._next_byte() != b"}"
        while has_more:
            written_name, value = yield from self._scan_member()
            written_names.append(written_name)
            pairs.append((_decode_name(written_name), value))
            if len(pairs) > MAX_MEMBERS:
                raise too_many_members_error()
            has_more = self._next_byte() == b","
            if has_more:
                self._position += 1
                yield from self._skip_blanks()
        self._expect(b"}")
        yield from self._skip_blanks()
        if self._position != self._size:
            raise not_json_error(f"something follows after it, at byte {self._position}")
        return pairs, written_names

    def _scan_member(self) -> Generator[None, None, tuple[memoryview, memoryview]]:
        """Returns a member's name and its value as they are written. Skips the blanks after the member."""
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
        """The next byte, which is not skipped. Empty at the end of the body."""
        return self._body[self._position : self._position + 1]

    def _expect(self, character: bytes) -> None:
        """Skips the next byte. Raises MalformedJson if it is not ``character``."""
        if self._next_byte() != character:
            raise self._error_here(f"no {character.decode()}")
        self._position += 1

    def _error_here(self, fault: str) -> MalformedJson:
        """The error for a fault at the next byte. At the end of the body the fault is always that the body ends."""
        if self._position >= self._size:
            return not_json_error("it ends too early")
        return not_json_error(f"{fault} at byte {self._position}")

    # -- skipping ------------------------------------------------------------------------------------------------

    def _skip_run(self, pattern: re.Pattern[bytes]) -> _Steps:
        """Skips all bytes that match. The pattern is one set of bytes, repeated, so a window may end anywhere."""
        while True:
            window_end = self._position + WINDOW
            match = pattern.match(self._body, self._position, window_end)
            assert match is not None, "a pattern that does not match zero bytes"
            self._position = match.end()
            if self._position < window_end:  # the next byte does not match
                return
            yield

    def _skip_blanks(self) -> _Steps:
        return self._skip_run(_BLANKS)

    def _skip_value(self) -> _Steps:
        """Skips a string, an array, an object, a number, ``true``, ``false`` or ``null``."""
        first_byte = self._next_byte()
        if first_byte == b'"':
            yield from self._skip_string()
        elif first_byte in (b"[", b"{"):
            yield from self._skip_nested()
        else:
            start = self._position
            yield from self._skip_run(_WORD)
            # A longer number is left to the server: to check it would take too long for one step.
            is_short = self._position - start < WINDOW
            if is_short and _SCALAR.fullmatch(self._body, start, self._position) is None:
                raise self._error_here("no value")

    def _skip_string(self) -> _Steps:
        """Skips a string with its quotation marks, window by window."""
        self._expect(b'"')
        while True:
            window_end = self._position + WINDOW
            match = _STRING_PART.match(self._body, self._position, window_end)
            assert match is not None, "a pattern that does not match zero bytes"
            self._position = match.end()
            if self._position >= self._size:
                raise self._error_here("no end of a string")
            if self._body[self._position] == _QUOTE:
                self._position += 1
                return
            # Either the window is at its end, or its last byte begins an escape, or the next byte is not allowed.
            window_cuts_escape = self._body[self._position] == _BACKSLASH and self._position + 1 == window_end
            if self._position < window_end and not window_cuts_escape:
                raise self._error_here("no character of a string")
            yield

    def _skip_nested(self) -> _Steps:
        """Skips an array or an object, window by window.

        In each window only the brackets outside of strings count. They are visited one by one only in the window in
        which the value ends."""
        self._position += 1
        depth, in_string = 1, False  # at the begin of the window
        window_bytes = FIRST_WINDOW
        while True:
            piece = self._body[self._position : self._position + window_bytes]
            is_last_window = self._position + len(piece) == self._size
            trailing_backslashes = len(piece) - len(piece.rstrip(b"\\"))
            if not is_last_window and trailing_backslashes % 2 == 1:
                piece = piece[:-1]  # the last backslash begins an escape: both its bytes must be in one window
            brackets, quote_count = self._find_brackets(piece, in_string=in_string)
            new_depth = _depth_after(brackets, depth)
            if new_depth == 0:
                self._position = self._find_end(brackets, depth, in_string, self._position + len(piece))
                yield
                return
            if is_last_window:
                self._position = self._size
                raise self._error_here("no end of a value")
            depth = new_depth
            if quote_count % 2 == 1:
                in_string = not in_string
            self._position += len(piece)
            window_bytes = min(window_bytes * 8, WINDOW)  # the value is not as short as most are
            yield

    def _find_brackets(self, piece: bytes, *, in_string: bool) -> tuple[bytes, int]:
        """Returns the brackets of this piece outside of strings, all written as square brackets, and the number of
        quotation marks in the piece that begin or end a string. ``in_string``: the piece begins inside a string. Raises
        MalformedJson for a character that may not stand outside of strings."""
        if b"\\" in piece:  # without escapes each quotation mark begins or ends a string
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')  # alternately outside and inside of strings
        first_outside = 1 if in_string else 0
        outside = b"".join(parts[first_outside::2])
        if outside.translate(None, _OUTSIDE_OF_STRINGS):
            raise self._error_here("a character that belongs to no value, after what stands")
        return outside.translate(_TO_SQUARE, _NO_BRACKETS), len(parts) - 1

    def _find_end(self, brackets: bytes, depth: int, in_string: bool, window_end: int) -> int:
        """Returns the index after the value that ends in this window. ``brackets``: those of the window, from
        ``_find_brackets``. ``depth`` and ``in_string``: at the begin of the window."""
        position = self._position
        if in_string:  # skip the rest of the string; the pattern needs its first quotation mark, of an earlier window
            match = _STRING_OR_BRACKET.match(b'"' + self._body[position:window_end])
            assert match is not None, "the bytes do not begin with a quotation mark"
            position += match.end() - 1  # without the quotation mark that was added
        depths = accumulate(map(_DEPTH_CHANGE.__getitem__, brackets), initial=depth)
        remaining_brackets = list(depths).index(0)  # up to the bracket that closes the value, this bracket included
        for token in _STRING_OR_BRACKET.finditer(self._body, position, window_end):
            is_bracket = self._body[token.start()] != _QUOTE
            if is_bracket:
                remaining_brackets -= 1
                if remaining_brackets == 0:
                    return token.end()
        raise AssertionError("the window has fewer brackets than were counted")


def _depth_after(brackets: bytes, depth: int) -> int:
    """The depth after these square brackets; 0 if the depth was 0 in between. Raises MalformedJson if the depth reaches
    ``MAX_DEPTH``.

    To save time, empty pairs of brackets are removed first, again and again. Then mostly two sorts of brackets remain:
    brackets that close levels that were open before, and brackets that open levels that stay open. These brackets are
    counted in parts. Only a part that could reach depth 0, or the limit, is counted bracket by bracket."""
    remaining = brackets
    if depth + brackets.count(b"[") < MAX_DEPTH:  # otherwise a removed pair might have been too deep
        for _ in range(MAX_COLLAPSES):
            shorter = remaining.replace(b"[]", b"")
            if len(shorter) == len(remaining):
                break
            remaining = shorter
    for start in range(0, len(remaining), PART_BRACKETS):
        part = remaining[start : start + PART_BRACKETS]
        closing = part.count(b"]")
        if closing < depth and depth + len(part) < MAX_DEPTH:
            opening = len(part) - closing
            depth += opening - closing
            continue
        for bracket in part:
            depth += _DEPTH_CHANGE[bracket]
            if depth <= 0:
                return 0
            if depth >= MAX_DEPTH:
                raise not_json_error(f"it nests more than {MAX_DEPTH} levels")
    return depth


def _decode_name(written: memoryview) -> str:
    """A member's name. The result is empty if no server could know the name: it is too long, no UTF-8, or has half of a
    surrogate pair."""
    if len(written) > MAX_NAME_BYTES:
        return ""
    try:
        return _decode_string(written)
    except ValueError:
        return ""


def not_json_error(reason: str) -> MalformedJson:
    return MalformedJson(f"the request body is not JSON: {reason}")


def too_many_members_error() -> MalformedJson:
    return MalformedJson(f"the request body has more than {MAX_MEMBERS} members")
