"""Reads JSON from a server that is not trusted: a value of a wrong type is ``None``, and never an exception."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

MIB = 1 << 20
# The limit for a report of a server, in values; 4,000 models of Ollama are 60,000 values. Not in bytes, because the
# number of values decides what it costs to parse a document: a few MiB of `[[],[],…` take a second and a gigabyte.
REPORT_VALUES = 200_000
# The limits for a frame or an answer: the final line of /api/generate holds its whole context, a number for each token.
ANSWER_VALUES = 300_000
ANSWER_BYTES = 16 << 20
SMALL_BYTES = 1 << 16  # a document up to this size is parsed without counting its values: it cannot cost much
# The memory that one value takes on the mean, with its place in its parent: a dictionary takes 64 to 232, a number 32.
OBJECT_BYTES = 100
# So many copies of a document's text are in memory while it is changed: the decoded text, its strings, the new text,
# and the new text as bytes.
TEXT_COPIES = 4
_encode = msgspec.json.Encoder().encode
_MAX_NUMBER = 1 << 62  # a larger number is not believed
_MAX_MODEL_BYTES = 1 << 46  # 64 TiB; a larger model is not believed
# Digits of a 64-bit number with its sign. Python reads longer numbers slowly, and none of more than 4,300 digits.
_MAX_DIGITS = 20
_LONG_FRACTION = re.compile(r"(\.\d{6})\d+")  # Python reads a fraction of a second of at most six digits


def dump_compact(document: Mapping[str, Any]) -> bytes:
    """The document as JSON without blanks. UTF-8 cannot hold a lone surrogate, so it is written as an escape. ``NaN``,
    which is no JSON, becomes ``null``."""
    try:
        return _encode(document)  # a tenth of the time of json.dumps: 16 MiB of text take 4 ms
    except (ValueError, RecursionError):  # a lone surrogate: every character beyond ASCII is written as an escape
        return json.dumps(document, separators=(",", ":")).encode()


def parse(data: bytes) -> Any:
    """Parses a document; ``None`` for bytes that are not JSON, and for a document that holds far more than any answer.

    The document ``null`` gives ``None`` as well: no caller has a use for it.
    """
    if not data or data.isspace():  # otherwise both parsers would scan what may be MiB of blanks
        return None
    if _exceeds_answer_limits(data):
        return None
    try:
        return msgspec.json.decode(data)
    except (ValueError, RecursionError):
        pass  # msgspec takes a third of the time of Python's parser, but reads no NaN, no lone surrogate and no UTF-16
    try:
        return json.loads(data)
    except (ValueError, RecursionError):  # no JSON, or nested too deeply
        return None


def _exceeds_answer_limits(data: bytes) -> bool:
    """Whether a document is too large for a frame or an answer, in bytes or in values."""
    if len(data) <= SMALL_BYTES:
        return False
    return len(data) > ANSWER_BYTES or too_many_values(data, ANSWER_VALUES)


def parse_object(data: bytes) -> dict[str, Any] | None:
    """Parses a JSON object; ``None`` for any other document, and whenever ``parse`` returns ``None``."""
    document = parse(data)
    return document if isinstance(document, dict) else None


_decode_raw = msgspec.json.Decoder(msgspec.Raw).decode


def is_cut(data: bytes) -> bool:
    """Whether the document begins as a JSON object or list, and does not end as one: its end is missing."""
    if data.lstrip()[:1] not in (b"{", b"["):
        return False
    if not data.rstrip().endswith((b"}", b"]")):
        return True
    try:
        _decode_raw(data)  # builds no objects, so it is fast for any size
    except (ValueError, RecursionError) as error:  # msgspec refuses NaN, and other values that clients may read
        # It also calls half of a surrogate pair truncated.
        return "truncated" in str(error) and (b"\\u" not in data or parse(data) is None)
    return False


def has_several(data: bytes) -> bool:
    """Whether something follows after the first document."""
    try:
        _decode_raw(data)
    except (ValueError, RecursionError) as error:
        return "trailing" in str(error)
    return False


def too_many_values(data: bytes, limit: int = REPORT_VALUES) -> bool:
    """Whether a document seems to hold more than ``limit`` values: to parse it could cost as much as a hundred others.

    Each value follows a comma or an opening bracket. So these characters are counted, even those inside of texts.
    """
    if len(data) <= limit:
        return False
    return len(data) - len(data.translate(None, b",[{")) > limit  # faster than to count each of them


def parse_report(data: bytes, limit: int = REPORT_VALUES) -> dict[str, Any] | None:
    """Parses an object that a server sends about itself; ``None`` for anything else, and if it has too many values.

    ``NaN`` and a number of more than 64 bits become ``None``; the rest of the document is kept.
    """
    if too_many_values(data, limit):
        return None
    try:
        document = _REPORT_DECODER.decode(data.decode("utf-8", "replace").removeprefix("\ufeff"))  # the mark of UTF-8
    except (ValueError, RecursionError):  # no JSON, or nested too deeply
        return None
    return document if isinstance(document, dict) else None


def is_strict_object(data: bytes) -> bool:
    """Whether any client's parser reads these bytes as an object: strict JSON, in UTF-8, without a lone surrogate."""
    if too_many_values(data, ANSWER_VALUES):
        return False
    try:
        document = _STRICT_DECODER.decode(data.decode("utf-8"))
        if b"\\ud" in data.lower():  # there are escapes of surrogates, in pairs or alone
            json.dumps(document, ensure_ascii=False).encode()  # raises ValueError for a lone surrogate
    except (ValueError, RecursionError):  # no strict JSON, no UTF-8, a lone surrogate; or brackets that are too deep
        return False
    return isinstance(document, dict)


def _refuse_constant(text: str) -> None:
    """Refuses a constant that strict JSON does not have: raises ValueError. ``text`` is ``NaN``, ``Infinity`` or
    ``-Infinity``."""
    raise ValueError(f"{text} is no JSON")


def _parse_short_number(digits: str) -> int | None:
    """The number; ``None`` if it has more than ``_MAX_DIGITS`` digits."""
    return int(digits) if len(digits) <= _MAX_DIGITS else None


_STRICT_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_REPORT_DECODER = json.JSONDecoder(parse_int=_parse_short_number, parse_constant=lambda _: None)


def parse_objects(pieces: Sequence[bytes]) -> list[dict[str, Any]]:
    """Parses many small documents for little more than the cost of one. A piece that is not an object becomes
    ``{}``."""
    documents = parse(b"[" + b",".join(pieces) + b"]")
    # A piece that is no JSON breaks the list, or makes one entry too many or too few. Then each piece is parsed by
    # itself.
    if not isinstance(documents, list) or len(documents) != len(pieces):
        documents = [parse(piece) for piece in pieces]
    return [document if isinstance(document, dict) else {} for document in documents]


def estimate_memory(data: bytes, limit: int) -> int | None:
    """An upper bound, in bytes, of the memory that it takes to parse the document and to write it again. ``None``: the
    bound is above ``limit``, or ``parse`` would not read the document.

    Each value and each key is an object, and one of the four characters ``,:[{`` is before it."""
    text_size = TEXT_COPIES * len(data)
    if text_size > limit:
        return None
    object_count = len(data) - len(data.translate(None, b",:[{"))  # the number of these characters
    size = text_size + OBJECT_BYTES * object_count
    if size > limit:
        return None
    # There are no more values than objects, so that most documents are not searched once more.
    may_exceed_limits = len(data) > ANSWER_BYTES or object_count > ANSWER_VALUES
    return None if may_exceed_limits and _exceeds_answer_limits(data) else size


def as_text(value: Any) -> str | None:
    """The value if it is a text, else ``None``."""
    return value if isinstance(value, str) else None


def as_count(value: Any) -> int | None:
    """A count or a size: a number from 0 up, without its fraction; ``None`` for any other value."""
    if as_number(value) is None:
        return None
    return int(value)  # not of the float that as_number returns: a float cannot hold every count


def as_number(value: Any) -> float | None:
    """A finite number from 0 up, such as a duration; ``None`` for any other value."""
    if type(value) is int:  # nearly always, and every answer passes here: one check instead of two
        return float(value) if 0 <= value <= _MAX_NUMBER else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value <= _MAX_NUMBER else None


def as_bounded_count(value: Any, most: int) -> int | None:
    """A count of at most ``most``; ``None`` for any other value: a larger count is not believed."""
    count = as_count(value)
    return count if count is not None and count <= most else None


def as_mib(value: Any) -> int | None:
    """A number of bytes as MiB, rounded; ``None`` for a value that cannot be the size of a model."""
    size = as_bounded_count(value, _MAX_MODEL_BYTES)
    return None if size is None else round(size / MIB)


def as_objects(value: Any, limit: int = 10_000) -> tuple[dict[str, Any], ...]:
    """The objects among the first ``limit`` entries of a list; other entries are left out."""
    if not isinstance(value, list):
        return ()
    return tuple(item for item in value[:limit] if isinstance(item, dict))


def as_datetime(value: Any) -> datetime | None:
    """A time in RFC 3339 as Go writes it, with nanoseconds; ``None`` for any other value, and for the year 1: Go's zero
    time means "no time". A time without a zone counts as UTC."""
    if not isinstance(value, str) or len(value) > 64:  # no time is so long
        return None
    try:
        time = datetime.fromisoformat(_LONG_FRACTION.sub(r"\1", value))
        time = time.astimezone(UTC) if time.tzinfo is not None else time.replace(tzinfo=UTC)
    except (ValueError, OverflowError):  # no time, or a time that Python cannot hold
        return None
    return time if time.year > 1 else None
