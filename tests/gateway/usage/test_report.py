from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from gpumesh.gateway.usage.counts import UsageCounts
from gpumesh.gateway.usage.journal import UsageKey
from gpumesh.gateway.usage.report import Grouping, parse_since, read_report, report_json
from gpumesh.gateway.usage.store import UsageStore
from gpumesh.topology import KeySpec, RequestRate

NOW = datetime(2026, 12, 1, 9, tzinfo=UTC)
KEYS = (
    KeySpec("chat", env="A", rate=RequestRate(60, 60.0), tokens_per_month=1000),
    KeySpec("night", env="B", tokens_per_month=500),
    KeySpec("free", env="C"),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "u.sqlite"
    store = UsageStore(path)
    for number, (day, key, node) in enumerate(
        [("2026-11-29", "chat", "a"), ("2026-11-30", "chat", "b"), ("2026-12-01", "chat", "a"), ("2026-12-01", "", "a")]
    ):
        counts = UsageCounts(2, 1, 0, 10, 10**number, 1, 1.5, 3600.0 if node == "a" else 0.0)
        store.append([(UsageKey(day, key, "m", node), counts)])
    store.close()
    return path


def test_a_report_by_key(path: Path) -> None:
    report = read_report(path, by=[Grouping.KEY], since="2026-11-30", keys=KEYS, now=NOW)
    document = report_json(report, "home")
    assert document["rows"] == [
        {
            "key": "",
            "requests": 2,
            "failed": 1,
            "cancelled": 0,
            "prompt_tokens": 10,
            "completion_tokens": 1000,
            "tokens": 1010,
            "estimated_requests": 1,
            "gpu_seconds": 1.5,
            "energy_wh": 1.0,
        },
        {
            "key": "chat",
            "requests": 4,
            "failed": 2,
            "cancelled": 0,
            "prompt_tokens": 20,
            "completion_tokens": 110,
            "tokens": 130,
            "estimated_requests": 2,
            "gpu_seconds": 3.0,
            "energy_wh": 1.0,
        },
    ]
    assert document["total"] == {
        "requests": 6,
        "failed": 3,
        "cancelled": 0,
        "prompt_tokens": 30,
        "completion_tokens": 1110,
        "tokens": 1140,
        "estimated_requests": 3,
        "gpu_seconds": 4.5,
        "energy_wh": 2.0,
    }
    month = {"month": "2026-12", "resets_at": "2027-01-01T00:00:00Z"}
    assert document["budgets"] == [
        {"key": "chat", "tokens_per_month": 1000, "used_tokens": 110, "rate": "60/m", **month},
        {"key": "night", "tokens_per_month": 500, "used_tokens": 0, "rate": None, **month},
    ]
    assert (document["schema"], document["mesh"], document["since"]) == ("gpumesh.usage/1", "home", "2026-11-30")


def test_days_are_in_order_and_energy_may_be_unknown(path: Path) -> None:
    by = [Grouping.DAY, Grouping.NODE, Grouping.DAY]
    rows = report_json(read_report(path, by=by, since="2026-01-01", now=NOW), "home")["rows"]
    assert isinstance(rows, list)
    assert [(row["day"], row["node"], row["energy_wh"]) for row in rows] == [
        ("2026-11-29", "a", 1.0),
        ("2026-11-30", "b", None),
        ("2026-12-01", "a", 2.0),
    ]


def test_a_report_for_one_key_tells_nothing_of_others(path: Path) -> None:
    report = read_report(path, by=[Grouping.MODEL], since="2026-01-01", keys=KEYS, only_key="chat", now=NOW)
    assert report.total.requests == 6
    assert [budget.key for budget in report.budgets] == ["chat"]


def test_without_a_file_there_is_nothing(tmp_path: Path) -> None:
    report = read_report(tmp_path / "none", by=[Grouping.KEY], since="2026-01-01", keys=KEYS, now=NOW)
    assert report.lines == ()
    assert [budget.used_tokens for budget in report.budgets] == [0, 0]


@pytest.mark.parametrize(
    ("text", "day"),
    [("1d", "2026-12-01"), ("30d", "2026-11-02"), (" 2026-11-05 ", "2026-11-05"), ("7d", "2026-11-25")],
)
def test_since(text: str, day: str) -> None:
    assert parse_since(text, NOW) == day


@pytest.mark.parametrize("text", ["", "0d", "9999d", "30", "1w", "2026-02-30", "yesterday"])
def test_a_since_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="is "):
        parse_since(text, NOW)
