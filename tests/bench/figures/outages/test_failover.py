"""The figures of an outage, from made-up requests whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpumesh.bench.figures.outages.failover import (
    FailoverFigures,
    OutageTimes,
    TextCheck,
    failover_figures,
    was_continued,
)
from gpumesh.bench.figures.outages.failover_text import failover_sentences
from gpumesh.bench.figures.outages.node_events import HealthChange
from gpumesh.bench.load.samples import LoadSample, StageRun
from gpumesh.bench.workload.stages import PlannedRequest
from gpumesh.mesh.outages.outage import OutageKind
from gpumesh.state import Health
from tests.bench.example_results import CHAT, failed_record, make_stage_run, record, stage

START_S = 1000.0  # of the stage, on the clock of those who watch
ASKED = replace(CHAT, options={"num_predict": 11})


def times(kind: OutageKind = OutageKind.TUNNEL, **changes: float | None) -> OutageTimes:
    """Out from 2.0 s of the stage to 4.0 s."""
    made = OutageTimes("oslo", kind, asked_s=START_S + 2.0, out_s=START_S + 2.01, released_s=START_S + 4.0)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def answer(index: int, sent_s: float, first: str = "oslo", last: str | None = None, **changes: Any) -> LoadSample:
    return record(index, sent_s=sent_s, first_node=first, node=last or first, **changes)


def run_of(*records: LoadSample) -> StageRun:
    of = replace(stage("failover"), requests=(PlannedRequest(ASKED),) * len(records))
    return replace(make_stage_run(*records, duration_s=6.0, of=of), start_s=START_S)


def figures(run: StageRun, outage: OutageTimes, check: TextCheck | None = None) -> FailoverFigures:
    changes = [
        HealthChange(START_S, "oslo", Health.HEALTHY),
        HealthChange(START_S + 2.02, "turku", Health.DOWN),
        HealthChange(START_S + 2.05, "oslo", Health.DOWN, "reset"),
        HealthChange(START_S + 4.3, "oslo", Health.HEALTHY),
    ]
    return failover_figures(run, outage, changes, check or TextCheck())


def test_what_clients_saw_and_when_the_mesh_knew() -> None:
    gap = answer(1, 1.9, last="turku", attempts=2)
    gap = replace(gap, arrivals_s=(*gap.arrivals_s[:5], *(at_s + 0.3 for at_s in gap.arrivals_s[5:])), ended_s=2.4)
    run = run_of(
        answer(0, 0.5),
        gap,
        answer(2, 2.02, first="turku", attempts=2, ttft_ms=400.0),
        answer(3, 2.08, first="turku"),
        failed_record(4, sent_s=2.04, node="oslo"),
        answer(5, 4.5),
    )
    found = figures(run, times(healthy_s=START_S + 4.3, served_s=START_S + 4.6))
    assert (found.node, found.out_s, found.back_s, found.noticed_as) == ("oslo", 2.0, 4.0, "reset")
    assert found.noticed_ms == pytest.approx(50.0)
    assert found.avoided_ms == pytest.approx(80.0)
    assert found.last_tried_ms == pytest.approx(40.0)
    assert found.longest_gap_ms == pytest.approx(310.0)
    assert found.usual_gap_ms == pytest.approx(10.0)
    assert found.longest_ttft_ms == pytest.approx(400.0)
    assert (found.continued, found.retried, found.cut, found.failed) == (1, 1, 0, 1)
    assert found.healthy_ms == pytest.approx(300.0)
    assert found.serves_ms == pytest.approx(600.0)


def test_the_gateway_does_not_tell_who_ended_an_answer() -> None:
    """It was begun by a node whose tunnel was cut before its end."""
    through = answer(0, 1.95, first="oslo")
    assert through.ended_s > 2.01
    assert was_continued(through, times(), START_S)
    assert not was_continued(through, times(OutageKind.DRAIN), START_S), "a draining node ends its answers itself"
    assert not was_continued(answer(0, 1.95, first="turku"), times(), START_S)
    assert not was_continued(answer(0, 0.5), times(), START_S)


def test_tokens_are_counted_by_text_or_else_by_their_number() -> None:
    whole, continued = answer(0, 0.5), answer(1, 1.95, last="turku", attempts=2)
    by_text = figures(run_of(whole, continued), times(), TextCheck(1, 0, repeated=2, lost=0, is_deterministic=True))
    assert (by_text.tokens_repeated, by_text.tokens_lost, by_text.counted_by) == (2, 0, "text")
    by_counts = figures(run_of(whole, continued), times())
    assert (by_counts.tokens_repeated, by_counts.tokens_lost, by_counts.counted_by) == (0, 0, "counts")
    shorter = answer(1, 1.95, last="turku", attempts=2, tokens=9)
    assert figures(run_of(whole, shorter), times()).tokens_lost == 2
    # Pieces that are no tokens count nothing.
    coarse = answer(0, 0.5, tokens=4)
    unknown = figures(run_of(coarse, continued), times())
    assert (unknown.tokens_repeated, unknown.tokens_lost, unknown.counted_by) == (None, None, None)


def test_it_is_told_in_sentences() -> None:
    whole, continued = answer(0, 0.5), answer(1, 1.95, last="turku", attempts=2)
    check = TextCheck(1, 0, repeated=0, lost=0, is_deterministic=True)
    found = figures(run_of(whole, continued), times(healthy_s=START_S + 5.5), check)
    notice, requests, clients, tokens, back = failover_sentences(found)
    assert notice == "oslo, tunnel cut: noticed after 50 ms; no request that avoided it was seen"
    assert requests == "requests: 1 continued, 0 retried, 0 cut, 0 failed"
    assert clients.startswith("clients: longest gap 10 ms (10 ms before)")
    assert tokens == "tokens of continued answers: 0 repeated, 0 lost (by text, of 1 asked for again)"
    assert back == "put back: healthy after 1.5 s, its first token after an unknown time"
    unlike = replace(found, tokens_repeated=None, tokens_lost=None, text_check=TextCheck(is_deterministic=False))
    assert "not answered alike twice" in list(failover_sentences(unlike))[3]
    assert "there was none" in list(failover_sentences(replace(found, continued=0)))[3]
