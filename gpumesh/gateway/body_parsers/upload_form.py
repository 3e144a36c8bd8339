"""``UploadParser`` reads a form with one file piece by piece, as it comes, and never holds more than a few KiB. Pure.

The file may have any length: its bytes are passed on at once, all but those that could be the beginning of the line
that ends it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from gpumesh.gateway.body_parsers.part_head import MAX_PART_HEAD_BYTES, form_error, read_part_head
from gpumesh.gateway.http.errors import BadRequest

MAX_PARTS = 100
MAX_FIELD_BYTES = 4 << 10  # of a part that is not the file
MAX_END_BYTES = 4 << 10  # that may follow after the end of the form, and must be blank
FILE_FIELD = "file"


@dataclass(frozen=True, slots=True)
class FormField:
    """A part that is plain text."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class FileStart:
    """The file begins: its bytes come next. ``name`` is as the client sent it."""

    name: str


FormEvent = FormField | FileStart | bytes
"""What the parser reports. ``bytes`` are a piece of the file."""


class _State(Enum):
    """What comes next."""

    FIRST_DELIMITER = auto()
    DELIMITER_END = auto()  # a line end after a delimiter, or the "--" of the last one
    HEAD = auto()
    FIELD = auto()
    FILE_START = auto()  # the line end after the head of the file's part
    FILE = auto()
    AFTER_END = auto()


class UploadParser:
    """Feed the body's pieces to ``feed``, and call ``finish`` at its end. Both raise BadRequest for a form that cannot
    be read, that has no file or two, or whose other parts are too long."""

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._state = _State.FIRST_DELIMITER
        self._unread = b""
        self._part_count = 0
        self._field_name = ""
        self._field_names: set[str] = set()

    def __repr__(self) -> str:
        return f"<UploadParser {self._state.name}, {len(self._unread)} bytes unread>"

    def feed(self, data: bytes) -> list[FormEvent]:
        """Reads the next piece of the body. Returns what it completes."""
        self._unread += data
        events: list[FormEvent] = []
        while self._read_next(events):
            pass
        return events

    def finish(self) -> None:
        """Checks that the form has ended, and has had its file."""
        if self._state is not _State.AFTER_END:
            raise form_error("it ends too early")
        if FILE_FIELD not in self._field_names:
            raise BadRequest("the form has no part `file`")

    def _read_next(self, events: list[FormEvent]) -> bool:
        """Reads the next element, and appends what it completes. Returns whether another element may follow in the
        unread bytes."""
        match self._state:
            case _State.FIRST_DELIMITER:
                return self._read_first_delimiter()
            case _State.DELIMITER_END:
                return self._read_delimiter_end()
            case _State.HEAD:
                return self._read_head(events)
            case _State.FIELD:
                return self._read_field(events)
            case _State.FILE_START:
                return self._read_file_start()
            case _State.FILE:
                return self._read_file(events)
            case _State.AFTER_END:
                if self._unread.strip() or len(self._unread) > MAX_END_BYTES:
                    raise form_error("something follows after its end")
        return False

    def _read_first_delimiter(self) -> bool:
        for start in (self._delimiter, self._delimiter[2:]):  # clients may send an empty line first
            if self._unread.startswith(start):
                return self._end_part(len(start))
            if start.startswith(self._unread):
                return False
        raise form_error("it does not begin with its boundary")

    def _end_part(self, end: int) -> bool:
        """Skips the unread bytes up to this index, which is the end of a delimiter."""
        self._unread = self._unread[end:]
        self._state = _State.DELIMITER_END
        return True

    def _read_delimiter_end(self) -> bool:
        line_end = self._unread[:2]
        if len(line_end) < 2:
            return False
        if line_end == b"--":
            self._state = _State.AFTER_END
            self._unread = self._unread[2:]
        elif line_end == b"\r\n":
            self._state = _State.HEAD
            self._part_count += 1
            if self._part_count > MAX_PARTS:
                raise form_error(f"it has more than {MAX_PARTS} parts")
        else:
            raise form_error("a part does not begin with a line of the boundary")
        return True

    def _read_head(self, events: list[FormEvent]) -> bool:
        """Reads a part's head, which begins with the line end after the delimiter."""
        end = self._unread.find(b"\r\n\r\n", 0, MAX_PART_HEAD_BYTES)
        if end < 0:
            if len(self._unread) > MAX_PART_HEAD_BYTES:
                raise form_error("a part has no end of its head")
            return False
        part = read_part_head(self._unread[2:end])
        # The line end after the head stays: without any content, it is a part of the delimiter.
        self._unread = self._unread[end + 2 :]
        name = _decode(part.name, "the name of a part")
        if name in self._field_names:
            raise BadRequest(f"the form has `{name[:100]}` twice")
        self._field_names.add(name)
        if name == FILE_FIELD:
            file_name = b"" if part.file_name is None else part.file_name
            events.append(FileStart(file_name.decode("utf-8", "replace")))
            self._state = _State.FILE_START
        elif part.is_file or part.is_encoded:
            raise BadRequest(f"`{name[:100]}` is plain text, and only `{FILE_FIELD}` is a file")
        else:
            self._field_name = name
            self._state = _State.FIELD
        return True

    def _read_field(self, events: list[FormEvent]) -> bool:
        end = self._unread.find(self._delimiter)
        if end < 0 or end > MAX_FIELD_BYTES:
            if max(end, len(self._unread) - len(self._delimiter)) > MAX_FIELD_BYTES:
                raise BadRequest(f"`{self._field_name[:100]}` is too long", status=413)
            return False
        value = self._unread[2:end] if end else b""
        events.append(FormField(self._field_name, _decode(value, f"`{self._field_name[:100]}`")))
        return self._end_part(end + len(self._delimiter))

    def _read_file_start(self) -> bool:
        if len(self._unread) < len(self._delimiter):
            return False
        if self._unread.startswith(self._delimiter):  # the file is empty
            return self._end_part(len(self._delimiter))
        self._unread = self._unread[2:]
        self._state = _State.FILE
        return True

    def _read_file(self, events: list[FormEvent]) -> bool:
        """Passes on the bytes of the file, but not those that may be the first bytes of the delimiter."""
        unread, delimiter = self._unread, self._delimiter
        end = unread.find(delimiter)
        size = end if end >= 0 else max(len(unread) - len(delimiter) + 1, 0)
        if size:
            events.append(unread[:size])
        if end >= 0:
            return self._end_part(end + len(delimiter))
        self._unread = unread[size:]
        return False


def _decode(value: bytes, subject: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"{subject} is not UTF-8") from error
