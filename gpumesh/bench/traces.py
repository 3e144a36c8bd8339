"""Public traces of LLM traffic as requests to replay: Azure's CSV (Splitwise, ISCA 2024; CC-BY 4.0) and Mooncake's
JSONL (FAST '25; Apache-2.0). Text in, requests out; reading the file is the caller's."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from gpumesh.errors import UsageError

MAX_REQUESTS = 1_000_000


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """``at_s`` is from the trace's start. ``blocks`` name the prompt's 512-token blocks: equal ids, equal text."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def parse_trace(lines: Iterable[str], *, file: str, limit: int | None = None) -> list[TracedRequest]:
    """The trace's requests in order of time, of either format, ``limit`` at most.

    Raises UsageError, with file and line, for what is neither.
    """
    numbered = enumerate(lines, start=1)
    first = next(((number, line) for number, line in numbered if line.strip()), None)
    if first is None:
        raise UsageError(f"{file}: the trace is empty")
    read = _mooncake if first[1].lstrip().startswith("{") else _azure
    found: list[TracedRequest] = []
    for request in read(_chain(first, numbered), file):
        found.append(request)
        if len(found) >= min(limit or MAX_REQUESTS, MAX_REQUESTS):
            break
    if not found:
        raise UsageError(f"{file}: the trace holds no request")
    found.sort(key=lambda request: request.at_s)
    return found


NumberedLines = Iterator[tuple[int, str]]


def _chain(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> NumberedLines:
    yield first
    yield from rest


def _azure(lines: NumberedLines, file: str) -> Iterator[TracedRequest]:
    _, header = next(lines)
    names = next(csv.reader([header]))
    try:
        when, prompt, output = (names.index(name) for name in ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
    except ValueError:
        raise UsageError(
            f"{file}:1: not a trace that can be replayed",
            hint="Azure's CSV begins with TIMESTAMP,ContextTokens,GeneratedTokens; Mooncake's is JSONL",
        ) from None
    start: datetime | None = None
    for number, line in lines:
        if not line.strip():
            continue
        row = next(csv.reader([line]))
        try:
            at = _timestamp(row[when])
            request = _request(0.0, int(row[prompt]), int(row[output]))
        except (ValueError, IndexError) as error:
            raise UsageError(f"{file}:{number}: not a row of this trace: {error}") from None
        start = start or at
        yield TracedRequest((at - start).total_seconds(), request.prompt_tokens, request.output_tokens)


def _timestamp(text: str) -> datetime:
    """Azure writes seven digits of a second; Python reads six."""
    whole, _, fraction = text.strip().partition(".")
    found = datetime.fromisoformat(f"{whole}.{fraction[:6]:0<6}" if fraction else whole)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _mooncake(lines: NumberedLines, file: str) -> Iterator[TracedRequest]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            blocks = tuple(int(block) for block in row.get("hash_ids", ()))
            yield _request(
                float(row["timestamp"]) / 1000.0, int(row["input_length"]), int(row["output_length"]), blocks
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{file}:{number}: not a request of this trace: {error!r}") from None


def _request(at_s: float, prompt: int, output: int, blocks: tuple[int, ...] = ()) -> TracedRequest:
    if not math.isfinite(at_s) or at_s < 0 or prompt < 0 or output < 0:
        raise ValueError("times and lengths are not negative")
    return TracedRequest(at_s, max(prompt, 1), max(output, 1), blocks)
