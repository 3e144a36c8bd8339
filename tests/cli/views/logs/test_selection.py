from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest

from gpumesh.cli.views.logs.selection import LogLevel, LogSelection, parse_since
from gpumesh.errors import UsageError

NOW = datetime(2026, 11, 30, 12, 0, tzinfo=timezone(timedelta(hours=1)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1h", NOW - timedelta(hours=1)),
        ("90s", NOW - timedelta(seconds=90)),
        ("1h30m", NOW - timedelta(minutes=90)),
        ("2d", NOW - timedelta(days=2)),
        ("0.5h", NOW - timedelta(minutes=30)),
        ("11:30", NOW - timedelta(minutes=30)),
        ("12:00:01", NOW + timedelta(seconds=1) - timedelta(days=1)),
        ("2026-11-30", NOW.replace(hour=0)),
        ("2026-11-30T10:00", NOW.replace(hour=10)),
        ("2026-11-30T10:00:00Z", datetime(2026, 11, 30, 10, tzinfo=UTC)),
    ],
)
def test_since(text: str, expected: datetime) -> None:
    assert parse_since(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "1", "h", "1 hour", "yesterday", "1h x", "25:00", "-1h"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="neither a duration nor a time"):
        parse_since(text, NOW)


def line(**changes: object) -> str:
    return json.dumps(
        {"at": "2026-11-30T10:00:00.000Z", "level": "warning", "node": "iceland", "message": "x"} | changes
    )


@pytest.mark.parametrize(
    ("selection", "taken"),
    [
        (LogSelection(), True),
        (LogSelection(nodes=frozenset({"iceland", "local"})), True),
        (LogSelection(nodes=frozenset({"local"})), False),
        (LogSelection(level=LogLevel.WARNING), True),
        (LogSelection(level=LogLevel.ERROR), False),
        (LogSelection(since=NOW - timedelta(hours=2)), True),
        (LogSelection(since=NOW - timedelta(minutes=30)), False),
    ],
)
def test_what_is_taken(selection: LogSelection, taken: bool) -> None:
    assert selection.takes(line()) is taken


@pytest.mark.parametrize("odd", ["", "no json", "[]", "5", "{}", '{"at": 5, "level": "loud"}', "[" * 100_000])
def test_what_is_no_line_of_ours_is_taken_only_with_all(odd: str) -> None:
    assert LogSelection().takes(odd)
    assert not LogSelection(level=LogLevel.INFO).takes(odd)
    assert not LogSelection(since=NOW).takes(odd)
