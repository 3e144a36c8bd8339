from __future__ import annotations

from dataclasses import replace

import pytest
from rich.cells import cell_len

from gpumesh.cli.views.pool.start_progress import show_start
from gpumesh.cli.views.pool.state_view import format_progress, print_pool, print_pools
from gpumesh.pools.base import PoolPhase, PoolState
from tests.cli.views.pool.samples import GIB, NOW, member, state

LOADING = state(
    PoolPhase.LOADING, loaded_bytes=9 * GIB, load_bytes=40 * GIB, load_bytes_per_s=105 * 2**20, left_s=302.0
)
BACKOFF = state(
    PoolPhase.BACKOFF,
    reason="the worker on iceland ended",
    hint="`gpumesh logs` has its last lines",
    retry_in_s=8.0,
    starts=3,
    members=(member("iceland", problem="exit code 1"),),
)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_table_shows_phases_and_reasons_at_any_width(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_pools([state(PoolPhase.READY, tokens_per_s=10.8), LOADING, BACKOFF], NOW)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert "● ready" in lines[2]
    assert "◐ loading 22 %" in lines[3]
    assert "↻ backoff" in lines[4]
    assert "the worker on icela" in lines[4]


def test_one_pool_is_shown_with_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    print_pool(state(PoolPhase.READY, tokens_per_s=10.8, draft_acceptance=0.68), NOW)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "● big  llama3.3:70b  ready for 2h"
    assert " ".join(lines[4].split()) == "vengeance 40 22.0 GiB 21.9 GiB (-0.5 %) is head"
    assert " ".join(lines[5].split()).startswith("iceland 41 22.0 GiB 22.3 GiB (+1.4 %) 41 ms through this machine")
    assert "measured   10.8 tokens/s for one stream" in lines
    assert "draft      68 % of the proposed tokens were accepted" in lines
    assert "planned    11.2 tokens/s for one stream, 38.0 for 4 together" in lines


def test_a_failure_has_its_reason_hint_and_next_start(capsys: pytest.CaptureFixture[str]) -> None:
    print_pool(BACKOFF, NOW)
    out = capsys.readouterr().out
    assert "the worker on iceland ended; starts again in 8s" in out
    assert "→ `gpumesh logs` has its last lines" in out
    assert "exit code 1" in out
    assert "starts     3 since" in out


def test_a_stopped_pool_says_how_it_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    print_pool(PoolState("big", "m", PoolPhase.STOPPED), NOW)
    assert capsys.readouterr().out == "○ big  m  stopped\n  → `gpumesh pool up big` starts it\n"


def test_progress_has_what_is_known() -> None:
    assert format_progress(LOADING) == "22 %, 9.0 of 40.0 GiB, 105 MiB/s, 5m left"
    assert format_progress(state(PoolPhase.LOADING, loaded_bytes=GIB)) == "1.0 GiB"
    assert format_progress(state(PoolPhase.LOADING)) == ""
    assert format_progress(state(PoolPhase.READY, loaded_bytes=GIB)) == ""


def test_a_line_for_each_phase_and_tenth_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with show_start(quiet=False) as display:
        display(state(PoolPhase.PLANNING))
        display(state(PoolPhase.PLANNING))
        for part in range(41):
            display(state(PoolPhase.LOADING, loaded_bytes=part * GIB, load_bytes=40 * GIB))
        display(state(PoolPhase.STOPPING, reason="the worker on iceland ended"))
        display(BACKOFF)
        display(replace(BACKOFF, retry_in_s=7.0))
        display(state(PoolPhase.STARTING, reason="waiting for iceland"))
        display(state(PoolPhase.FAILED, reason="its error follows"))
        display(state(PoolPhase.READY))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "big looks at its hosts and its model"
    assert lines[1:12] == [
        f"big loads the model: {tenth}0 %, {gib} of 40.0 GiB".replace(" 00 %", " 0 %")
        for tenth, gib in enumerate(["0 MiB", *(f"{4 * tenth}.0" for tenth in range(1, 11))])
    ]
    assert lines[12:] == [
        "big stops its programs",
        "big has failed: the worker on iceland ended; starts again in 8s",
        "big starts its programs: waiting for iceland",
        "big is ready",
    ]


def test_quiet_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with show_start(quiet=True) as display:
        display(LOADING)
    assert capsys.readouterr() == ("", "")
