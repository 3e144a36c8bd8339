"""What is drawn of batches, at any width, and the sentences about what a command has done."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.cells import cell_len

from gpumesh.batches.progress import BatchProgress
from gpumesh.batches.reasons import BatchWait, SeenError, SeenErrors
from gpumesh.batches.values import BatchCounts, BatchStatus
from gpumesh.cli.views.batch.batch_table import print_batches
from gpumesh.cli.views.batch.batch_view import print_batch
from gpumesh.cli.views.batch.sentences import (
    describe_cancel,
    describe_results,
    describe_retry,
    describe_submission,
)
from gpumesh.cli.views.batch.texts import format_rate, format_share
from gpumesh.cli.views.batch.watch_display import show_watch
from tests.cli.views.batch.samples import ALL, ENDED, NOW, batch

RUNNING = BatchProgress(ALL[0], 34.2)
HOSTILE = "status 400: \x1b[31mthe prompt\n" + "x" * 300
WAITING = BatchProgress(
    batch(BatchStatus.IN_PROGRESS, counts=BatchCounts(500, 0, 250)),
    0.0,
    BatchWait("batch_" + "5" * 24, 3),
    SeenErrors((SeenError(HOSTILE, 150), SeenError("status 500: out of memory", 40), SeenError("no", 10)), 200),
)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_views_fit_any_width(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_batches([RUNNING, *map(BatchProgress, ALL)], NOW)
    table = capsys.readouterr().out.splitlines()
    assert "◐ in progress" in table[2]
    assert "48 %" in table[2]
    for shown in (RUNNING, WAITING, *map(BatchProgress, ALL)):
        print_batch(shown, NOW)
    lines = table + capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert "\x1b" not in "".join(lines)


def test_one_batch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    print_batch(RUNNING, NOW)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "◐ batch_6f3a  prompts.jsonl  in progress for 12m",
        "  █████████████████████████░░░░░░░░░░░░░░░░░░░░░░░░░  48 %  24,124 of 50,000, 12 failed",
        "",
        "rate       34/s, about 13m left",
        "under way  8 now; 25,868 wait",
        "window     ends in 24h",
        "sent to    the mesh, as prompts",
        "results    21 MiB: `gpumesh batch results batch_6f3a` prints them",
    ]
    print_batch(BatchProgress(ENDED), NOW)
    text = capsys.readouterr().out
    assert "completed 1m ago" in text
    assert "took       25m" in text
    assert "`gpumesh batch retry batch_6f3a` sends 12 again" in text
    print_batch(BatchProgress(ALL[5]), NOW)
    text = capsys.readouterr().out
    assert "wrong      line 17: unknown key 'promt'" in text
    assert "… and 130 more lines" in text


def test_a_batch_that_waits_and_has_failed_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    print_batch(WAITING, NOW)
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == f"waits      behind batch_{'5' * 24} and 2 more; batches run one after the other"
    assert not any(line.startswith("rate") for line in lines)
    failed = lines.index(next(line for line in lines if line.startswith("failed")))
    assert lines[failed].startswith("failed     150 of the first 200: status 400: the prompt xxx")
    assert lines[failed].endswith("x…")
    assert [line.strip() for line in lines[failed + 1 : failed + 3]] == [
        "40 of the first 200: status 500: out of memory",
        "10 of the first 200: other errors; `gpumesh batch results batch_6f3a --failed` prints all",
    ]
    with show_watch(quiet=False) as display:
        display(WAITING)
    assert "250 of 500, 250 failed, waits behind batch_5" in capsys.readouterr().err


def test_a_batch_that_stands_still_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_batch(BatchProgress(batch(BatchStatus.IN_PROGRESS, age_s=100_000), 0.0), NOW)
    text = capsys.readouterr().out
    assert "no result in the last minutes" in text
    assert "has passed" in text


@pytest.mark.parametrize(
    ("per_s", "text"), [(1234.0, "1,234/s"), (34.2, "34/s"), (2.54, "2.5/s"), (0.5, "30/min"), (0.001, "3.6/h")]
)
def test_rates(per_s: float, text: str) -> None:
    assert format_rate(per_s) == text


@pytest.mark.parametrize(("done", "text"), [(0, "0 %"), (1, "<1 %"), (49_999, "99 %"), (50_000, "100 %")])
def test_shares_are_neither_0_nor_100_unless_that_is_exact(done: int, text: str) -> None:
    assert format_share(batch(BatchStatus.IN_PROGRESS, counts=BatchCounts(50_000, done))) == text


def test_sentences() -> None:
    running, cancelled = ALL[0], ALL[4]
    assert describe_submission(replace(running, error_count=1)) == (
        "50,000 prompts, to be answered within 24h; 1 wrong line left out:"
        " `gpumesh batch show batch_6f3a --watch` shows how far they are"
    )
    assert describe_submission(batch(BatchStatus.IN_PROGRESS, endpoint="/v1/embeddings")).startswith(
        "50,000 requests, "
    )
    assert describe_retry(ENDED, ENDED) == "batch_6f3a: 12 of 2,000 requests to be sent again"
    whole = replace(ENDED, counts=BatchCounts(2, 2))
    assert describe_retry(whole, whole) == "batch_6f3a: nothing to send again, each request is answered"
    assert describe_cancel(running, ALL[3]) == "batch_6f3a is being cancelled: 8 requests under way to be ended"
    assert describe_cancel(running, cancelled) == ("batch_6f3a is cancelled: 24,124 of 50,000 requests have a result")
    assert describe_cancel(cancelled, cancelled) == "batch_6f3a is cancelled already"
    assert list(describe_results(running, "out.jsonl", written=24_124, failed=12, only_failed=False)) == [
        "24,124 results written to out.jsonl",
        "batch_6f3a is in progress: 25,876 of 50,000 have no result yet",
        "12 requests failed",
    ]
    assert list(describe_results(whole, None, written=2, failed=0, only_failed=False)) == []


def test_a_watch_that_is_piped_has_a_line_for_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with show_watch(quiet=False) as display:
        for done in (0, 1, 2, 3, 4, 5, 10):
            status = BatchStatus.COMPLETED if done == 10 else BatchStatus.IN_PROGRESS
            display(BatchProgress(batch(status, counts=BatchCounts(20, done)), 2.0))
    assert capsys.readouterr().err.splitlines() == [
        "batch_6f3a in progress: 0 of 20, 2.0/s, 10s left",
        "batch_6f3a in progress: 2 of 20, 2.0/s, 9s left",
        "batch_6f3a in progress: 4 of 20, 2.0/s, 8s left",
    ]
