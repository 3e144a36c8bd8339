"""Writes the arguments of the Lua functions of this room, and reads their answers. Pure: values and bytes.

Whatever Redis answers is hostile until it was read here: an answer of another form raises BatchStoreError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from gpumesh.batches.values import (
    Batch,
    BatchCounts,
    BatchStatus,
    Claim,
    LineError,
    NewBatch,
    NewRequest,
    RecordedResult,
    StoredFile,
)
from gpumesh.errors import BatchStoreError

P = ParamSpec("P")
R = TypeVar("R")

Argument = str | bytes | int | float


def encode(argument: Argument) -> bytes:
    """The argument as Redis gets it. Lone surrogates of a text become question marks, as in the SQLite store: the name
    of a file may have such, the ``custom_id`` of a line too."""
    return argument if isinstance(argument, bytes) else str(argument).encode("utf-8", "replace")


def _checked(read: Callable[P, R]) -> Callable[P, R]:
    """Raises BatchStoreError when the answer has another form than ``read`` expects."""

    @wraps(read)
    def read_or_raise(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return read(*args, **kwargs)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            message = f"Redis has something else where a batch or a file should be ({type(error).__name__})"
            raise BatchStoreError(message) from error

    return read_or_raise


@_checked
def read_stored_file(file_id: str, answer: list[bytes]) -> StoredFile:
    fields = _read_fields(answer)
    return StoredFile(
        id=file_id,
        name=fields["name"],
        size=int(fields["size"]),
        created_at=float(fields["created_at"]),
        purpose=fields["purpose"],
        owner=fields["owner"],
    )


@_checked
def read_files(answer: list[Any]) -> list[StoredFile]:
    return [read_stored_file(file_id.decode(), fields) for file_id, fields in answer]


@_checked
def read_batch(answer: list[Any]) -> Batch:
    """``answer``: id, fields, the number of the claimed requests, the bad lines."""
    batch_id, members, claimed, bad_lines = answer
    fields = _read_fields(members)

    def number(name: str) -> int:
        return int(fields.get(name, 0))

    def moment(name: str) -> float | None:
        return float(fields[name]) if name in fields else None

    return Batch(
        id=batch_id.decode(),
        new=NewBatch(
            endpoint=fields["endpoint"],
            input_file_id=fields["file"],
            name=fields["name"],
            window_s=float(fields["window_s"]),
            owner=fields["owner"],
            metadata=json.loads(fields["metadata"]),
        ),
        status=BatchStatus(fields["status"]),
        created_at=float(fields["created_at"]),
        expires_at=float(fields["expires_at"]),
        counts=BatchCounts(
            total=number("total"),
            completed=number("completed"),
            failed=number("failed"),
            claimed=int(claimed),
            output_bytes=number("output_bytes"),
            error_bytes=number("error_bytes"),
        ),
        in_progress_at=moment("in_progress_at"),
        cancelling_at=moment("cancelling_at"),
        ended_at=moment("ended_at"),
        read_lines=number("read_lines"),
        errors=tuple(LineError(*json.loads(bad_line)) for bad_line in bad_lines),
        error_count=number("error_count"),
    )


@_checked
def read_batches(answer: list[Any]) -> list[Batch]:
    return [read_batch(batch) for batch in answer]


@_checked
def read_claims(answer: list[Any]) -> list[Claim]:
    return [
        Claim(
            batch_id=batch_id.decode(),
            line=int(line),
            content=content,
            endpoint=endpoint.decode(),
            owner=owner.decode(),
            group=group.decode(),
            expires_at=float(expires_at),
            tries=int(tries),
            lost=int(lost),
            token=token.decode(),
        )
        for batch_id, line, content, endpoint, owner, group, expires_at, tries, lost, token in answer
    ]


@_checked
def read_results(answer: list[Any]) -> list[RecordedResult]:
    return [
        RecordedResult(position=position.decode(), line=int(line), content=content, failed=failed == 1)
        for position, line, content, failed in answer
    ]


@_checked
def read_number(answer: Any) -> int:
    return int(answer)


@_checked
def read_unwanted(claims: Sequence[Claim], answer: list[int]) -> set[tuple[str, int]]:
    """The keys of those claims for which the answer of ``renew`` has a 0."""
    return {claim.key for claim, is_wanted in zip(claims, answer, strict=True) if not is_wanted}


def write_error(error: LineError) -> str:
    """A bad line as it is stored."""
    return json.dumps([error.line, error.code, encode(error.message).decode()])


def write_request(request: NewRequest) -> str:
    """A request as a member of the sorted set ``sorting`` (``lua/common.lua``). Redis sorts such members by their
    bytes, so they are sorted by ``order``, then by ``line``: a space is less than each hexadecimal digit."""
    return f"{request.order.hex()} {request.line:010d} {request.offset} {request.size} {request.group}"


def _read_fields(answer: Iterable[bytes]) -> dict[str, str]:
    """The fields of a hash, from their names and values in turn."""
    texts = [text.decode() for text in answer]
    return dict(zip(texts[::2], texts[1::2], strict=True))
