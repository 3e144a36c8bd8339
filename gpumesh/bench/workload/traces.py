"""Parses public traces of LLM traffic for the scenario ``replay``: Azure's CSV and Mooncake's JSONL. Pure.

Azure's is from Splitwise (ISCA 2024; CC-BY 4.0), Mooncake's from FAST '25 (Apache-2.0). The caller reads the file.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from gpumesh.errors import UsageError

MAX_REQUESTS = 1_000_000  # more would take much memory, and hours to replay

NumberedLines = Iterator[tuple[int, str]]
"""Each line of a file with its number, which counts from 1."""


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """A request of a trace: when it came, in seconds from the start of the trace, and how long it was.

    ``blocks`` are the ids of the prompt's blocks of 512 tokens; equal ids mean equal text. Only Mooncake has ids.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def parse_trace(lines: Iterable[str], *, file: str, limit: int | None = None) -> list[TracedRequest]:
    """Reads the first ``limit`` requests of a trace in one of the two formats, and returns them in order of time.

    Without ``limit``, or with a larger one, it reads the first ``MAX_REQUESTS``. ``file`` is the file's name for
    errors. Raises UsageError, with file and line, when the text has neither format or holds no request.
    """
    numbered_lines = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    first_numbered_line = next(numbered_lines, None)
    if first_numbered_line is None:
        raise UsageError(f"{file}: the trace is empty")
    _number, first_line = first_numbered_line
    parse = _parse_mooncake if first_line.lstrip().startswith("{") else _parse_azure
    max_requests = min(limit or MAX_REQUESTS, MAX_REQUESTS)
    all_requests = parse(itertools.chain([first_numbered_line], numbered_lines), file)
    requests = list(itertools.islice(all_requests, max_requests))
    if not requests:
        raise UsageError(f"{file}: the trace holds no request")
    requests.sort(key=lambda request: request.at_s)
    return requests


def _parse_azure(lines: NumberedLines, file: str) -> Iterator[TracedRequest]:
    """Parses the lines of Azure's CSV, without empty lines. The first line has the names of the columns."""
    _number, header = next(lines)
    names = next(csv.reader([header]))
    try:
        time_column = names.index("TIMESTAMP")
        prompt_column = names.index("ContextTokens")
        output_column = names.index("GeneratedTokens")
    except ValueError:
        raise UsageError(
            f"{file}:1: not a trace that can be replayed",
            hint="Azure's CSV begins with TIMESTAMP,ContextTokens,GeneratedTokens; Mooncake's is JSONL",
        ) from None
    first_time: datetime | None = None
    for number, line in lines:
        row = next(csv.reader([line]))
        try:
            time = _parse_timestamp(row[time_column])
            request = _make_request(0.0, int(row[prompt_column]), int(row[output_column]))
        except (ValueError, IndexError) as error:
            raise UsageError(f"{file}:{number}: not a row of this trace: {error}") from None
        first_time = first_time or time
        # The seconds may be negative: the rows need not be in order of time.
        yield replace(request, at_s=(time - first_time).total_seconds())


def _parse_timestamp(text: str) -> datetime:
    """Parses a time of Azure's CSV, in UTC if it names no zone. Raises ``ValueError`` for a text that is no time.

    Azure writes seven digits after the point of the seconds; Python reads at most six. A zone after these digits is
    lost: no harm, because only differences of times are used.
    """
    whole, _, fraction = text.strip().partition(".")
    microseconds = f"{fraction[:6]:0<6}"  # exactly six digits: a shorter fraction gets zeros at its end
    time = datetime.fromisoformat(f"{whole}.{microseconds}" if fraction else whole)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _parse_mooncake(lines: NumberedLines, file: str) -> Iterator[TracedRequest]:
    """Parses the lines of Mooncake's JSONL, without empty lines. Each line is a request; its timestamp is in ms."""
    for number, line in lines:
        try:
            row = json.loads(line)
            blocks = tuple(int(block) for block in row.get("hash_ids", ()))
            at_s = float(row["timestamp"]) / 1000.0
            request = _make_request(at_s, int(row["input_length"]), int(row["output_length"]), blocks)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            # The line is no JSON or no object, a member is missing or of another type, or the JSON is nested too deep.
            raise UsageError(f"{file}:{number}: not a request of this trace: {error!r}") from None
        yield request


def _make_request(at_s: float, prompt_tokens: int, output_tokens: int, blocks: tuple[int, ...] = ()) -> TracedRequest:
    """Makes a request with at least one token in the prompt and the answer: a length of 0 cannot be replayed.

    Raises ``ValueError`` for a negative time or length, and for an infinite time.
    """
    if not math.isfinite(at_s) or at_s < 0 or prompt_tokens < 0 or output_tokens < 0:
        raise ValueError("times and lengths are not negative")
    return TracedRequest(at_s, max(prompt_tokens, 1), max(output_tokens, 1), blocks)
