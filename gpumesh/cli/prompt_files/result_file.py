"""The file of `run -f --out FILE`: a JSON line for each result, which a later run with `--resume` goes on with.

A line is appended as soon as its result is there, so that a run can be killed at any moment. What such a run leaves is
a beginning, perhaps with half a line at its end. A run that goes on keeps the lines of prompts that were answered and
removes the others: half a line, and results with an error, whose prompts are sent again. Where that leaves gaps, new
lines stand behind later ones until the run ends; then ``finish`` puts all lines in order.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from array import array
from collections.abc import Iterator
from io import BufferedReader, FileIO
from pathlib import Path
from typing import BinaryIO

from gpumesh.cli.prompt_files.prompt_file import PromptFile, prompt_digest
from gpumesh.errors import GPUMeshError, UsageError
from gpumesh.files import atomic_file, file_lock

_LINE_BEGIN = b'{"index": '
_KEYS = {"index", "prompt", "response", "error"}  # those of a result that are read here
_NOT_WRITTEN = -1
_OTHER_FILE_HINT = "--resume goes on with the results of the same prompts; without it, name a new file"


class ResultFile:
    """An open file of results, which no other run may write to. Memory: 8 bytes for each prompt."""

    def __init__(self, name: str, prompts: PromptFile, *, resume: bool) -> None:
        """Opens the file, or makes it. With ``resume`` finds the results that it has, and changes nothing yet.

        Raises UsageError if the file cannot be opened, if it has anything and ``resume`` is false, and if it has
        anything but results of these prompts. Raises GPUMeshError if another run writes to it."""
        self.name = name
        self._path = Path(os.path.realpath(name))  # where a link points to: the link itself is never replaced
        self._prompts = prompts
        self._offsets = array("q", [_NOT_WRITTEN]) * prompts.count  # where the line of an index begins
        self._end = 0  # where the next line begins
        self._last_index = -1
        self._is_in_order = True
        self._failed_count = 0
        self._has_gaps = False  # lines that are to be removed stand before others that are kept
        self._file = self._open()
        try:
            self._scan(resume)
        except BaseException:
            self._file.close()
            raise

    @property
    def done_count(self) -> int:
        """How many prompts have been answered."""
        return sum(offset != _NOT_WRITTEN for offset in self._offsets)

    @property
    def failed_count(self) -> int:
        """How many results with an error the file had when it was opened."""
        return self._failed_count

    def is_missing(self, index: int) -> bool:
        """Whether the prompt is to be sent."""
        return self._offsets[index] == _NOT_WRITTEN

    def begin(self) -> None:
        """Removes all but the results that stay. Raises OSError, and then the file is unchanged."""
        if self._has_gaps or not self._is_in_order:
            self._rewrite()
        else:
            self._file.truncate(self._end)

    def write(self, index: int, line: bytes) -> None:
        """Appends the result of a prompt; ``line`` has no line break. Raises OSError, for example if the disk is full;
        then no part of the line is in the file."""
        data = memoryview(line + b"\n")
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise OSError(error.errno, error.strerror, self.name) from error
        self._note_line(index, len(data))

    def finish(self) -> None:
        """Puts the lines in the order of the prompts. Raises OSError, and then the file is unchanged."""
        if not self._is_in_order:
            self._rewrite()

    def close(self) -> None:
        self._file.close()

    # -- opening -----------------------------------------------------------------------------------------------------

    def _open(self) -> FileIO:
        """The file, locked. Raises as the constructor does."""
        try:
            file = FileIO(self._path, "a+")  # a: each write goes to the end
        except OSError as error:
            raise UsageError(f"cannot write {self.name}: {error.strerror}") from error
        try:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"--out {self.name} is no regular file", hint="without --out results go to stdout")
            if not _lock(file.fileno()) or not os.path.samestat(status, os.stat(self._path)):  # it was just replaced
                raise GPUMeshError(f"another `gpumesh run` writes to {self.name}")
        except BaseException:
            file.close()
            raise
        return file

    def _scan(self, resume: bool) -> None:
        """Finds the results in the file. Raises UsageError."""
        if not resume and os.fstat(self._file.fileno()).st_size:
            raise UsageError(f"{self.name} exists already", hint="--resume goes on with it, and keeps its results")
        position = 0
        with _buffered(self._file) as reader:
            for number, line in enumerate(reader, 1):
                location = f"{self.name}:{number}"
                if not line.endswith(b"\n"):
                    _require_half_line(line, location)
                    return
                index = self._read_result(line, location)
                if index is not None:
                    self._has_gaps |= position != self._end
                    self._end = position
                    self._note_line(index, len(line))
                position += len(line)

    def _read_result(self, line: bytes, location: str) -> int | None:
        """The index of a result that stays. ``None``: it has an error, or the file has an earlier result of the index.
        Raises UsageError if the line is not a result of one of the prompts."""
        try:
            result = json.loads(line)
        except (ValueError, RecursionError):
            result = None
        if not isinstance(result, dict) or not result.keys() >= _KEYS:
            raise UsageError(f"{location}: not a result of `gpumesh run -f`", hint=_OTHER_FILE_HINT)
        index, prompt = result["index"], result["prompt"]
        if type(index) is not int or not isinstance(prompt, str):
            raise UsageError(f"{location}: not a result of `gpumesh run -f`", hint=_OTHER_FILE_HINT)
        if not 0 <= index < self._prompts.count:
            message = f"{location}: has index {index}, but {self._prompts.name} has {self._prompts.count:,} prompts"
            raise UsageError(message, hint=_OTHER_FILE_HINT)
        if prompt_digest(prompt) != self._prompts.digests[index]:
            message = f"{location}: the prompt of index {index} is another one in {self._prompts.name}"
            raise UsageError(message, hint=_OTHER_FILE_HINT)
        if result["error"] is not None or result["response"] is None:
            self._failed_count += 1
            return None
        return index if self.is_missing(index) else None

    # -- writing -----------------------------------------------------------------------------------------------------

    def _note_line(self, index: int, size: int) -> None:
        """Notes that a line of ``size`` bytes with this result was written at the end."""
        self._offsets[index] = self._end
        self._end += size
        self._is_in_order &= index > self._last_index
        self._last_index = max(self._last_index, index)

    def _rewrite(self) -> None:
        """Replaces the file by one that has the noted lines only, in order. Raises OSError."""
        mode = stat.S_IMODE(os.fstat(self._file.fileno()).st_mode)
        atomic_file.replace_with_pieces(self._path, self._lines_in_order(), mode=mode)
        self._file.close()
        self._file = self._open()
        self._end, self._last_index, self._is_in_order, self._has_gaps = 0, -1, True, False
        indexes = (index for index, offset in enumerate(self._offsets) if offset != _NOT_WRITTEN)
        with _buffered(self._file) as reader:
            for index, line in zip(indexes, reader, strict=True):
                self._note_line(index, len(line))

    def _lines_in_order(self) -> Iterator[bytes]:
        with _buffered(self._file) as reader:
            for offset in self._offsets:
                if offset != _NOT_WRITTEN:
                    reader.seek(offset)
                    yield reader.readline()


def _lock(descriptor: int) -> bool:
    """Locks an open file until it is closed. Returns False when another process holds the lock."""
    try:
        return file_lock.try_acquire(descriptor)
    except OSError:  # neither the system nor the file system has such locks
        return True


@contextlib.contextmanager
def _buffered(file: FileIO) -> Iterator[BinaryIO]:
    """A reader of the file, from its beginning. The file stays open after the block."""
    file.seek(0)
    reader = BufferedReader(file)
    try:
        yield reader
    finally:
        reader.detach()


def _require_half_line(line: bytes, location: str) -> None:
    """Raises UsageError if the last line of a file is not the beginning of a result. After a loss of power it may have
    zero bytes in place of what was not on the disk yet."""
    beginning = line.rstrip(b"\0")
    if not (_LINE_BEGIN.startswith(beginning) or beginning.startswith(_LINE_BEGIN)):
        raise UsageError(f"{location}: not a result of `gpumesh run -f`", hint=_OTHER_FILE_HINT)
