"""Parses public traces of LLM traffic for replay: Azure's CSV (Splitwise, ISCA 2024; CC-BY 4.0) and Mooncake's JSONL
(FAST '25; Apache-2.0). The caller reads the file."""

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


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """``at_s`` counts from the start of the trace. ``blocks`` are the ids of the prompt's 512-token blocks; equal ids
    mean equal text."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def parse_trace(lines: Iterable[str], *, file: str, limit: int | None = None) -> list[TracedRequest]:
    """The first ``limit`` requests of a trace in either format, in order of time.

    Raises UsageError, with file and line, when the text is in neither format.
    """
    numbered = enumerate(lines, start=1)
    first = next(((number, line) for number, line in numbered if line.strip()), None)
    if first is None:
        raise UsageError(f"{file}: the trace is empty")
    parse = _parse_mooncake if first[1].lstrip().startswith("{") else _parse_azure
    requests: list[TracedRequest] = []
    for request in parse(itertools.chain([first], numbered), file):
        requests.append(request)
        if len(requests) >= min(limit or MAX_REQUESTS, MAX_REQUESTS):
            break
    if not requests:
        raise UsageError(f"{file}: the trace holds no request")
    requests.sort(key=lambda request: request.at_s)
    return requests


def _parse_azure(lines: NumberedLines, file: str) -> Iterator[TracedRequest]:
    _, header = next(lines)
    names = next(csv.reader([header]))
    try:
        columns = [names.index(name) for name in ("TIMESTAMP", "ContextTokens", "GeneratedTokens")]
    except ValueError:
        raise UsageError(
            f"{file}:1: not a trace that can be replayed",
            hint="Azure's CSV begins with TIMESTAMP,ContextTokens,GeneratedTokens; Mooncake's is JSONL",
        ) from None
    time_column, prompt_column, output_column = columns
    start: datetime | None = None
    for number, line in lines:
        if not line.strip():
            continue
        row = next(csv.reader([line]))
        try:
            at = _parse_timestamp(row[time_column])
            request = _make_request(0.0, int(row[prompt_column]), int(row[output_column]))
        except (ValueError, IndexError) as error:
            raise UsageError(f"{file}:{number}: not a row of this trace: {error}") from None
        start = start or at
        # This may be negative: the rows need not be in order of time.
        yield replace(request, at_s=(at - start).total_seconds())


def _parse_timestamp(text: str) -> datetime:
    """Azure writes seven fractional digits of a second; Python reads six."""
    whole, _, fraction = text.strip().partition(".")
    moment = datetime.fromisoformat(f"{whole}.{fraction[:6]:0<6}" if fraction else whole)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _parse_mooncake(lines: NumberedLines, file: str) -> Iterator[TracedRequest]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            blocks = tuple(int(block) for block in row.get("hash_ids", ()))
            yield _make_request(
                float(row["timestamp"]) / 1000.0, int(row["input_length"]), int(row["output_length"]), blocks
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{file}:{number}: not a request of this trace: {error!r}") from None


def _make_request(at_s: float, prompt_tokens: int, output_tokens: int, blocks: tuple[int, ...] = ()) -> TracedRequest:
    """A request of at least one token each way: no server answers less. Raises ValueError."""
    if not math.isfinite(at_s) or at_s < 0 or prompt_tokens < 0 or output_tokens < 0:
        raise ValueError("times and lengths are not negative")
    return TracedRequest(at_s, max(prompt_tokens, 1), max(output_tokens, 1), blocks)
