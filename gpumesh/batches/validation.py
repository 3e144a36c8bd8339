"""Reads the input file of a new batch, and makes a request of each good line.

The lines are added in pieces. If the process is killed, or reads the file at the same time as another one, the reading
goes on after the last piece that was added, and no line counts twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from hashlib import blake2b

from gpumesh.batches.base import BatchStore
from gpumesh.batches.request_lines import LineProblem, find_order, read_request_line
from gpumesh.batches.values import MAX_LINE_BYTES, Batch, BatchStatus, LineError, NewRequest

LINES_AT_A_TIME = 25  # lines that are read and added before the tasks of the mesh run again: about 1 ms


@dataclass(frozen=True, slots=True)
class FileLine:
    """A line of a file. ``number`` counts from 1. ``offset`` and ``size``: where it stands, without line break.
    ``content`` is empty if the line is longer than ``MAX_LINE_BYTES``."""

    number: int
    offset: int
    size: int
    content: bytes


async def validate_batch(store: BatchStore, batch_id: str) -> Batch:
    """Reads the input file of the batch, unless that was done already. Returns the batch afterwards: IN_PROGRESS, or
    FAILED if no line is good; another status if it was cancelled meanwhile. Its ``errors`` are the bad lines. Raises
    as the store does."""
    batch = await store.get_batch(batch_id)
    if batch.status is not BatchStatus.VALIDATING:
        return batch
    reader = _Reader(batch)
    async for line in split_lines(store.read_file(batch.new.input_file_id)):
        reader.read(line)
        if line.number % LINES_AT_A_TIME == 0 and not await _add(store, reader):
            return await _wait_for_other_reader(store, batch_id)
    if not await _add(store, reader):
        return await _wait_for_other_reader(store, batch_id)
    last_line = reader.added_line
    batch = await store.get_batch(batch_id)
    if not batch.counts.total and not batch.error_count:
        error = LineError(0, "empty_file", "the file has no line that is not blank")
        await store.add_requests(batch_id, [], [error], after_line=last_line, through_line=last_line)
    return await store.finish_validation(batch_id, through_line=last_line)


async def _add(store: BatchStore, reader: _Reader) -> bool:
    """Adds what was read and is not added yet. Returns whether it was; else another process has added it, or the batch
    was cancelled."""
    await asyncio.sleep(0)
    if reader.last_line <= reader.added_line:  # added before the process was killed that read the file first
        return True
    was_added = await store.add_requests(
        reader.batch_id,
        reader.requests,
        reader.errors,
        after_line=reader.added_line,
        through_line=reader.last_line,
    )
    reader.added_line = reader.last_line
    reader.requests, reader.errors = [], []
    return was_added


OTHER_READER_WAIT_S = 0.5  # between two looks at how far the other process is
OTHER_READER_STALLS = 4  # after so many looks without a change, the other process counts as killed


async def _wait_for_other_reader(store: BatchStore, batch_id: str) -> Batch:
    """Waits while another process reads the file. Goes on in its place if it seems to be killed."""
    known_lines, stalls = -1, 0
    while True:
        batch = await store.get_batch(batch_id)
        if batch.status is not BatchStatus.VALIDATING:
            return batch
        stalls = stalls + 1 if batch.read_lines == known_lines else 0
        known_lines = batch.read_lines
        if stalls >= OTHER_READER_STALLS:
            return await validate_batch(store, batch_id)
        await asyncio.sleep(OTHER_READER_WAIT_S)


class _Reader:
    """What the lines of a file are: those after ``added_line`` are in ``requests`` and ``errors``."""

    def __init__(self, batch: Batch) -> None:
        self.batch_id = batch.id
        self.added_line = batch.read_lines
        self.last_line = 0
        self.requests: list[NewRequest] = []
        self.errors: list[LineError] = []
        self._endpoint = batch.new.endpoint
        self._custom_ids: dict[bytes, int] = {}  # the line of each, by a hash

    def read(self, line: FileLine) -> None:
        """Takes the next line."""
        self.last_line = line.number
        if not line.size:
            return
        is_added = line.number <= self.added_line
        try:
            if line.size > MAX_LINE_BYTES:
                raise LineProblem("line_too_long", f"the line has more than {MAX_LINE_BYTES >> 20} MiB")
            if line.content.isspace():
                return
            request = read_request_line(self._endpoint, line.content)
            if request.custom_id:
                self._require_new_id(request.custom_id, line.number)
            if not is_added:
                order, group = find_order(request.body)
                self.requests.append(NewRequest(line.number, line.offset, line.size, order, group))
        except LineProblem as problem:
            if not is_added:
                self.errors.append(LineError(line.number, problem.code, problem.message))

    def _require_new_id(self, custom_id: str, number: int) -> None:
        """Raises LineProblem if an earlier line has this ``custom_id``: the results could not be told apart."""
        digest = blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=12).digest()
        earlier = self._custom_ids.setdefault(digest, number)
        if earlier != number:
            raise LineProblem("duplicate_custom_id", f"line {earlier} has the same custom_id")


async def split_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[FileLine]:
    """The lines of a file that comes in chunks. Lines are ended by a line feed, and a carriage return before it belongs
    to the line break; the last line needs none."""
    number, offset, size = 0, 0, 0
    pieces: list[bytes] = []  # of the line that is not complete; none of a line that is too long

    def end_line(piece: bytes) -> FileLine:
        nonlocal number, offset, size, pieces
        number += 1
        size += len(piece)
        content = b"".join((*pieces, piece)) if size <= MAX_LINE_BYTES + 1 else b""
        line_size = size - 1 if content.endswith(b"\r") else size
        line = FileLine(number, offset, line_size, content[:line_size])
        offset += size + 1
        size, pieces = 0, []
        return line

    async for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            yield end_line(piece)
        size += len(rest)
        if size <= MAX_LINE_BYTES + 1:
            pieces.append(rest)
        else:
            pieces = []
    if size:
        yield end_line(b"")
