"""Reading JSON from a server that nobody vouches for: wrong types are unknown (``None``), never an exception."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

MIB = 1 << 20
# Of JSON's punctuation in one document. What it costs to parse goes by its values, not by its bytes: a few MiB of
# `[[],[],…` take a second and a gigabyte. The final line of /api/generate holds its whole context as numbers.
MOST_VALUES = 300_000
MOST_BYTES = 16 << 20
_SURELY_FEW = 64 << 10  # bytes
_LARGEST = 1 << 62
_FRACTION = re.compile(r"(\.\d{6})\d+")


def compact(document: Mapping[str, Any]) -> bytes:
    """As JSON without blanks. A lone surrogate, which UTF-8 cannot hold, stays an escape."""
    try:
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(document, separators=(",", ":")).encode()


def has_too_many_values(data: bytes) -> bool:
    if len(data) <= _SURELY_FEW:
        return False
    return len(data) > MOST_BYTES or sum(map(data.count, (b",", b":", b"[", b"{"))) > MOST_VALUES


def parse(data: bytes) -> Any:
    """The document, or ``None`` for what is no JSON (a document that is ``null`` is of no use here either), or what
    holds far more values than any answer does."""
    if has_too_many_values(data):
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def parse_object(data: bytes) -> dict[str, Any] | None:
    document = parse(data)
    return document if isinstance(document, dict) else None


def parse_objects(pieces: Sequence[bytes]) -> list[dict[str, Any]]:
    """Many small documents for little more than the cost of one; what is no object is an empty one."""
    documents = parse(b"[" + b",".join(pieces) + b"]")
    if not isinstance(documents, list) or len(documents) != len(pieces):
        documents = [parse(piece) for piece in pieces]
    return [document if isinstance(document, dict) else {} for document in documents]


def text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def whole(value: Any) -> int | None:
    """A count or a size: a number from 0 up."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return int(value) if 0 <= value <= _LARGEST else None


def number(value: Any) -> float | None:
    """A duration: a finite number from 0 up."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LARGEST:
        return None
    return float(value)


def mib(value: Any) -> int | None:
    """Bytes as MiB, rounded."""
    size = whole(value)
    return None if size is None else round(size / MIB)


def objects(value: Any, limit: int = 10_000) -> tuple[dict[str, Any], ...]:
    """The objects of a list; anything else in it is passed over."""
    if not isinstance(value, list):
        return ()
    return tuple(item for item in value[:limit] if isinstance(item, dict))


def instant(value: Any) -> datetime | None:
    """RFC 3339 as Go writes it, with nanoseconds; Go's zero time means: none."""
    if not isinstance(value, str) or len(value) > 64:
        return None
    try:
        read = datetime.fromisoformat(_FRACTION.sub(r"\1", value))
        read = read.astimezone(UTC) if read.tzinfo is not None else read.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
    return read if read.year > 1 else None
