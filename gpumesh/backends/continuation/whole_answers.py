"""Whether an answer with generated text that came in one piece is an answer, and is whole. Pure.

HTTP does not always tell: the body of an HTTP/1.0 server ends with its connection, however that ended, and a proxy may
pass on half of an answer as a whole one.
"""

from __future__ import annotations

import re

from gpumesh.backends import safe_json
from gpumesh.backends.continuation.event_streams import FAILED_REASONS, failed_reason_message
from gpumesh.backends.continuation.stream_formats import generates_text, stream_format_for
from gpumesh.backends.error_text import ERROR_BYTES

# Statuses that say themselves that the body is no answer to a prompt, or not all of it.
_NO_ANSWER_STATUSES = frozenset({202, 205, 206})
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_EVENT_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b"error:", b":")
_LAST_FRAMES = 16  # one of so many last frames ends the text, and blank frames or figures may follow
_FAILED_REASON = re.compile(rb'finish_reason"\s*:\s*"(' + "|".join(sorted(FAILED_REASONS)).encode() + rb')"')


def find_text_problem(path: str, status: int, body: bytes) -> str | None:
    """Why an inference server cannot have sent this body in answer to a prompt, as a sentence whose subject is "it";
    ``None`` if it can. It must be an object or a stream, as every server sends it."""
    if not generates_text(path):
        return None
    if status in _NO_ANSWER_STATUSES:
        return f"it answered a prompt with status {status}, as no inference server does"
    start = body[:256].removeprefix(_BYTE_ORDER_MARK).lstrip()
    if start.startswith(_EVENT_FIELDS):
        return None
    if not start.startswith(b"{"):
        return f"it answered {status} with a body that is no JSON object, as no inference server does"
    if len(body) <= len(b"{}") + 64 and safe_json.parse(body) == {}:
        return f"it answered {status} with an empty object, as no inference server does"
    return None


def is_cut_short(path: str, body: bytes) -> bool:
    """Whether the end of the body is missing, as the body itself shows it."""
    start = body[:256].removeprefix(_BYTE_ORDER_MARK).lstrip()
    if not start.startswith(_EVENT_FIELDS):
        if safe_json.is_cut(body.removeprefix(_BYTE_ORDER_MARK)):
            return True
        if not generates_text(path) or not safe_json.has_several(body):
            return False
    elif not generates_text(path):
        return False
    stream_format = stream_format_for(path)  # a stream whose Content-Type does not say so
    frames = body.strip().rsplit(stream_format.frame_separator, _LAST_FRAMES)[-_LAST_FRAMES:]
    return not any(frame.ends_stream or frame.text_complete for frame in map(stream_format.read, frames))


def find_failed_reason(body: bytes) -> str | None:
    """The error of a whole answer whose server gave it up (``FAILED_REASONS``); ``None`` if it did not, or if the
    answer is long."""
    match = _FAILED_REASON.search(body) if len(body) <= ERROR_BYTES else None
    return None if match is None else failed_reason_message(match[1].decode())
