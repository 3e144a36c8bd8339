"""Computes the figures of a failover from the requests of its stage and from what the mesh told meanwhile. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from gpumesh.bench.figures.outages.node_events import HealthChange
from gpumesh.bench.load.samples import LoadSample, SampleOutcome, StageRun
from gpumesh.mesh.outages.outage import OutageKind
from gpumesh.state import Health

OUTAGE_WORDS: Mapping[OutageKind, str] = MappingProxyType(
    {OutageKind.DRAIN: "drained", OutageKind.TUNNEL: "tunnel cut", OutageKind.SERVER: "server stopped"}
)
"""In which words a result tells an outage."""


@dataclass(slots=True)
class OutageTimes:
    """The moments of an outage, in seconds on one clock.

    ``asked_s``: the mesh was asked to take the node out; the outage begins between this and ``out_s``, when the mesh
    had done so. ``released_s``: the mesh was told to put it back. ``healthy_s``: the mesh told that it serves again.
    ``served_s``: the first piece of an answer came from it again.
    """

    node: str
    kind: OutageKind
    asked_s: float
    out_s: float | None = None
    released_s: float | None = None
    healthy_s: float | None = None
    served_s: float | None = None


@dataclass(frozen=True, slots=True)
class TextCheck:
    """What the comparison of answers with undisturbed ones has given (``failover/asked_again``).

    ``compared`` answers that another node continued were compared; ``other_texts`` of them went on with other words.
    ``is_deterministic``: whether answers that nothing disturbed came out equal again; ``None``: there was none. Without
    that, ``repeated`` and ``lost`` (tokens) say nothing, and are ``None``.
    """

    compared: int = 0
    other_texts: int = 0
    repeated: int | None = None
    lost: int | None = None
    is_deterministic: bool | None = None


@dataclass(frozen=True, slots=True)
class FailoverFigures:
    """What an outage of ``node`` did to clients. Times are in ms; unknown is ``None``.

    ``noticed_ms``: from the outage to the change of the node's health, as the mesh tells it. ``avoided_ms``: to the
    moment when the first request was sent that another node answered in its first attempt; ``last_tried_ms``: when the
    last one was sent that still met the node and had to go elsewhere, or failed.

    ``longest_gap_ms``: the longest time between two pieces of one answer, of those in flight in the outage;
    ``usual_gap_ms``: the same before it. ``longest_ttft_ms``: the longest wait for a first piece, of requests sent in
    the outage. ``continued`` answers were begun by one node and ended by another; ``retried`` requests moved before
    their first piece; ``failed`` and ``cut`` are the requests that a client saw fail.

    ``tokens_repeated`` and ``tokens_lost`` are those of continued answers. ``counted_by``: ``text``, where the answers
    were compared with undisturbed ones, or ``counts``, where their pieces were counted against the tokens that were
    asked for; ``None``: neither could tell.

    ``healthy_ms`` and ``serves_ms``: from the moment when the node was put back, to its health and to its first piece.
    """

    node: str
    by: OutageKind
    out_s: float
    back_s: float | None
    noticed_ms: float | None
    noticed_as: str | None
    avoided_ms: float | None
    last_tried_ms: float | None
    longest_gap_ms: float | None
    usual_gap_ms: float | None
    longest_ttft_ms: float | None
    retried: int
    continued: int
    failed: int
    cut: int
    tokens_repeated: int | None = None
    tokens_lost: int | None = None
    counted_by: str | None = None
    text_check: TextCheck | None = None
    healthy_ms: float | None = None
    serves_ms: float | None = None


def failover_figures(
    run: StageRun, times: OutageTimes, changes: Sequence[HealthChange], text_check: TextCheck
) -> FailoverFigures:
    """The figures of the outage in a stage. ``times`` and ``changes`` are on the clock of ``run.start_s``."""
    outage_s = times.asked_s - run.start_s
    end_s = run.duration_s if times.released_s is None else times.released_s - run.start_s
    met = [record for record in run.records if record.ended_s >= outage_s and record.sent_s < end_s]
    sent_in_outage = [record for record in met if record.sent_s >= outage_s]
    noticed = _find_notice(times, changes)
    continued = [record for record in met if was_continued(record, times, run.start_s)]
    continued_indexes = {record.index for record in continued}
    repeated, lost, counted_by = text_check.repeated, text_check.lost, "text"
    if repeated is None or lost is None:
        repeated, lost = _count_tokens(run, continued)
        counted_by = "counts"
    return FailoverFigures(
        node=times.node,
        by=times.kind,
        out_s=outage_s,
        back_s=None if times.released_s is None else end_s,
        noticed_ms=None if noticed is None else _ms_between(times.asked_s, noticed.at_s),
        noticed_as=None if noticed is None else noticed.reason or noticed.health.value,
        avoided_ms=_ms_between(outage_s, min(_moments_avoided(sent_in_outage, times.node), default=None)),
        last_tried_ms=_ms_between(outage_s, max(_moments_tried(sent_in_outage, times.node), default=None)),
        longest_gap_ms=max(_gaps_ms(met, outage_s, end_s), default=None),
        usual_gap_ms=max(_gaps_ms(run.records, 0.0, outage_s, is_whole=True), default=None),
        longest_ttft_ms=max((record.ttft_ms for record in sent_in_outage if record.ttft_ms is not None), default=None),
        retried=sum(record.attempts > 1 and record.index not in continued_indexes for record in met),
        continued=len(continued),
        failed=sum(record.outcome is SampleOutcome.FAILED for record in met),
        cut=sum(record.outcome is SampleOutcome.CUT for record in met),
        tokens_repeated=repeated,
        tokens_lost=lost,
        counted_by=None if repeated is None else counted_by,
        text_check=text_check,
        healthy_ms=_ms_between(times.released_s, times.healthy_s),
        serves_ms=_ms_between(times.released_s, times.served_s),
    )


def was_continued(record: LoadSample, times: OutageTimes, start_s: float) -> bool:
    """Whether another node ended the answer that the node of the outage had begun.

    The gateway tells only which node began an answer. But if the tunnel of that node was cut, or its server stopped,
    before the answer ended, another node has ended it.
    """
    if record.outcome is not SampleOutcome.SERVED or record.first_node != times.node:
        return False
    if record.node != record.first_node:
        return True
    if times.kind is OutageKind.DRAIN or times.out_s is None:
        return False
    return record.sent_s + start_s < times.asked_s and record.ended_s + start_s > times.out_s


def _find_notice(times: OutageTimes, changes: Sequence[HealthChange]) -> HealthChange | None:
    """The first change after the outage to a health that is the mesh's answer to it."""
    expected = (Health.DRAINING,) if times.kind is OutageKind.DRAIN else (Health.DOWN, Health.UNKNOWN)
    for change in changes:
        if change.node == times.node and change.at_s >= times.asked_s and change.health in expected:
            return change
    return None


def _moments_avoided(records: Sequence[LoadSample], node: str) -> Iterator[float]:
    """When each request was sent that another node answered in its first attempt."""
    for record in records:
        if record.outcome is SampleOutcome.SERVED and record.attempts == 1 and record.node != node:
            yield record.sent_s


def _moments_tried(records: Sequence[LoadSample], node: str) -> Iterator[float]:
    """When each request was sent that met the node in the outage: it needed a second attempt, or failed there."""
    for record in records:
        has_failed = record.outcome is not SampleOutcome.SERVED and record.node == node
        if record.attempts > 1 or has_failed:
            yield record.sent_s


def _gaps_ms(records: Sequence[LoadSample], begin_s: float, end_s: float, *, is_whole: bool = False) -> Iterator[float]:
    """The gaps between two pieces of one answer of which any part lies in this time; with ``is_whole``, the whole."""
    for record in records:
        for earlier_s, later_s in itertools.pairwise(record.arrivals_s):
            last_s = later_s if is_whole else earlier_s
            if later_s >= begin_s and last_s < end_s:
                yield (later_s - earlier_s) * 1000.0


def _count_tokens(run: StageRun, continued: Sequence[LoadSample]) -> tuple[int | None, int | None]:
    """The tokens that continued answers have twice, and those that they lack, by counts: their pieces against the
    tokens that were asked for. ``None`` if answers that nothing disturbed have another number of pieces than tokens."""
    indexes = {record.index for record in continued}
    whole = [record for record in run.records if record.done_reason == "length" and record.index not in indexes]
    if not continued or not whole or any(len(record.arrivals_s) != _asked_tokens(run, record) for record in whole):
        return None, None
    repeated = lost = 0
    for record in continued:
        asked = _asked_tokens(run, record)
        if record.done_reason != "length" or asked is None:
            return None, None
        repeated += max(len(record.arrivals_s) - asked, 0)
        lost += max(asked - len(record.arrivals_s), 0)
    return repeated, lost


def _asked_tokens(run: StageRun, record: LoadSample) -> int | None:
    """How many tokens the request asked for; ``None`` if it did not say."""
    asked = run.stage.requests[record.index].chat.options.get("num_predict")
    return asked if isinstance(asked, int) else None


def _ms_between(begin_s: float | None, end_s: float | None) -> float | None:
    """The time between two moments in ms; ``None`` if one is unknown."""
    return None if begin_s is None or end_s is None else (end_s - begin_s) * 1000.0
