"""Reading JSON from a server that nobody vouches for: wrong types are unknown (``None``), never an exception."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

MIB = 1 << 20
# What it costs to parse a document goes by its values, not by its bytes: a few MiB of `[[],[],…` take a second and a
# gigabyte. What a report of a server holds at most: 4,000 models of Ollama are 60,000 values.
REPORT_VALUES = 200_000
# A frame or an answer: the final line of /api/generate holds its whole context, a number for each token.
ANSWER_VALUES = 300_000
ANSWER_BYTES = 16 << 20
SMALL = 1 << 16  # bytes, of which it is not worth to ask what they hold
OBJECT_BYTES = 100  # of one value with its place in what holds it: a dictionary takes 64 to 232, a number 32
TEXTS = 4  # what it is decoded to, its strings, what it is written to, and that as bytes
_LARGEST = 1 << 62
_LARGEST_MODEL = 1 << 46  # bytes: 64 TiB
_DIGITS = 20  # of a 64-bit number with its sign; Python reads more only slowly, and more than 4,300 not at all
_FRACTION = re.compile(r"(\.\d{6})\d+")


def dump_compact(document: Mapping[str, Any]) -> bytes:
    """As JSON without blanks. A lone surrogate, which UTF-8 cannot hold, stays an escape."""
    try:
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(document, separators=(",", ":")).encode()


def parse(data: bytes) -> Any:
    """The document, or ``None`` for what is no JSON (a document that is ``null`` is of no use here either), and for one
    that holds far more than any answer does."""
    if not data or data.isspace():  # MiB of blanks would be scanned by both parsers
        return None
    if _exceeds_answers(data):
        return None
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass  # it takes a third of the time of Python's parser, but no NaN, no half of a surrogate pair, no UTF-16
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _exceeds_answers(data: bytes) -> bool:
    return len(data) > SMALL and (len(data) > ANSWER_BYTES or too_many_values(data, ANSWER_VALUES))


def parse_object(data: bytes) -> dict[str, Any] | None:
    document = parse(data)
    return document if isinstance(document, dict) else None


def too_many_values(data: bytes, limit: int = REPORT_VALUES) -> bool:
    """Whether a document holds more values than are read: it could cost the memory and time of a hundred others.

    Each value stands behind a comma or an opening bracket; those inside of texts are counted as well.
    """
    return data.count(b",") + data.count(b"[") + data.count(b"{") > limit


def parse_report(data: bytes, limit: int = REPORT_VALUES) -> dict[str, Any] | None:
    """An object that a server says of itself, ``None`` for what is none or has too many values. A number that is none
    (``NaN``) or that no 64 bits hold is ``None``, and the rest of the document stands."""
    if too_many_values(data, limit):
        return None
    try:
        document = _REPORTS.decode(data.decode("utf-8", "replace").removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def is_strict_object(data: bytes) -> bool:
    """Whether every parser reads it as an object: JSON by the letter, in UTF-8, without half of a surrogate pair."""
    if too_many_values(data, ANSWER_VALUES):
        return False
    try:
        document = _BY_THE_LETTER.decode(data.decode("utf-8"))
        if b"\\ud" in data.lower():
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _short_number(digits: str) -> int | None:
    return int(digits) if len(digits) <= _DIGITS else None


_BY_THE_LETTER = json.JSONDecoder(parse_constant=_no_constant)
_REPORTS = json.JSONDecoder(parse_int=_short_number, parse_constant=lambda _: None)


def parse_objects(pieces: Sequence[bytes]) -> list[dict[str, Any]]:
    """Many small documents for little more than the cost of one; what is no object is an empty one."""
    documents = parse(b"[" + b",".join(pieces) + b"]")
    if not isinstance(documents, list) or len(documents) != len(pieces):
        documents = [parse(piece) for piece in pieces]
    return [document if isinstance(document, dict) else {} for document in documents]


def estimate_memory(data: bytes, limit: int) -> int | None:
    """How many bytes the document takes at most when it is built and written anew; ``None``: more than ``limit``, or
    more than ``parse`` reads.

    Each value and key is an object, before each of which stands one of four signs."""
    if TEXTS * len(data) > limit or _exceeds_answers(data):
        return None
    size = TEXTS * len(data) + OBJECT_BYTES * (len(data) - len(data.translate(None, b",:[{")))
    return size if size <= limit else None


def as_text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def as_count(value: Any) -> int | None:
    """A count or a size: a number from 0 up."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return int(value) if 0 <= value <= _LARGEST else None


def as_number(value: Any) -> float | None:
    """A duration: a finite number from 0 up."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LARGEST:
        return None
    return float(value)


def as_bounded_count(value: Any, most: int) -> int | None:
    """A count that is believed: beyond ``most`` it says nothing."""
    read = as_count(value)
    return read if read is not None and read <= most else None


def as_mib(value: Any) -> int | None:
    """Bytes as MiB, rounded."""
    size = as_bounded_count(value, _LARGEST_MODEL)
    return None if size is None else round(size / MIB)


def as_objects(value: Any, limit: int = 10_000) -> tuple[dict[str, Any], ...]:
    """The objects of a list; anything else in it is passed over."""
    if not isinstance(value, list):
        return ()
    return tuple(item for item in value[:limit] if isinstance(item, dict))


def as_datetime(value: Any) -> datetime | None:
    """RFC 3339 as Go writes it, with nanoseconds; Go's zero time means: none."""
    if not isinstance(value, str) or len(value) > 64:
        return None
    try:
        read = datetime.fromisoformat(_FRACTION.sub(r"\1", value))
        read = read.astimezone(UTC) if read.tzinfo is not None else read.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
    return read if read.year > 1 else None
