"""The mesh's scheduler as the balancer of a simulation: which reports of the probes reach it."""

from __future__ import annotations

from random import Random

import pytest

from gpumesh.balancer.account import NodeAccount
from gpumesh.bench.simulate.requests import Job, ServerReport
from gpumesh.bench.simulate.scheduler_decisions import SchedulerDecisions
from gpumesh.topology import PolicyKind
from tests.bench.simulate.build import MODEL, OTHER, node, request

LISTED = frozenset((MODEL.name, OTHER.name))
IN_MEMORY = {MODEL.name: (5000, 4096)}


class Reports:
    """Gives reports to a balancer of one node, and counts those that reach its scheduler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fleet = [node(models=(MODEL, OTHER), max_parallel=1)]
        self.decisions = SchedulerDecisions(fleet, PolicyKind.ADAPTIVE, rng=Random(1), max_queue=10)
        self.noted: list[NodeAccount] = []
        monkeypatch.setattr(self.decisions._scheduler, "note_report", self.noted.append)
        self.tell(0.0)

    def tell(self, now: float, *, is_up: bool = True) -> int:
        """Gives a report. Returns how many reached the scheduler by then."""
        self.decisions.set_report("a", ServerReport(is_up, LISTED, IN_MEMORY), now)
        return len(self.noted)

    def send(self, number: int, now: float, model: str = MODEL.name) -> None:
        sent = request(number, now, model=model)
        self.decisions.submit(Job(sent, now, sent.prompt_tokens, sent.output_tokens), now)


def test_a_report_without_news_does_not_reach_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = Reports(monkeypatch)
    assert [reports.tell(2.0), reports.tell(4.0)] == [1, 1]
    assert [reports.tell(6.0, is_up=False), reports.tell(8.0, is_up=False), reports.tell(10.0)] == [2, 2, 3]


def test_a_report_reaches_the_scheduler_while_a_load_is_awaited_or_a_request_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reports = Reports(monkeypatch)
    reports.send(0, 1.0)
    assert reports.tell(2.0) == 1
    reports.send(1, 3.0)  # the only slot is taken: it waits
    assert [reports.tell(4.0), reports.tell(6.0)] == [2, 3]
    others = Reports(monkeypatch)
    others.send(0, 1.0, OTHER.name)  # makes the server load the model
    assert [others.tell(2.0), others.tell(4.0)] == [2, 3]
