"""Writes the notes about what is not known of a stage, or not as it was asked for: a sentence for each. Pure.

A figure that is missing is a dash in the table and ``null`` in the JSON. The note says why, and of which node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from gpumesh.bench.figures.answers.coverage import Coverage
from gpumesh.bench.figures.node_shares import ColdStart
from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.text.sentences import join_some

MAX_NAMES = 5  # the nodes that a note names


def coverage_notes(stage: StageResult) -> list[str]:
    """The notes about the figures of a stage."""
    if stage.coverage is None:  # a result of an older version
        return []
    notes = [*_unknown_counts(stage, stage.coverage), *_clocks(stage, stage.coverage), *_pieces(stage.coverage)]
    notes += [*_lengths(stage.coverage), *_power(stage)]
    return [f"stage {stage_label(stage)}: {note}" for note in notes]


def cold_start_notes(cold_starts: Sequence[ColdStart]) -> Iterator[str]:
    """Yields a note for each node of a stage whose answers waited for their model."""
    for stage, node in dict.fromkeys((start.stage, start.node) for start in cold_starts):
        loads_ms = [start.load_ms for start in cold_starts if (start.stage, start.node) == (stage, node)]
        answers = "1 answer" if len(loads_ms) == 1 else f"{len(loads_ms)} answers"
        yield f"stage {stage}: {answers} of {node} waited for a load of the model, {max(loads_ms) / 1e3:.1f} s at most"


def _unknown_counts(stage: StageResult, coverage: Coverage) -> Iterator[str]:
    """The notes about counts of tokens that the servers did not give."""
    if coverage.token_counts < coverage.answers:
        nodes = _names(share.node for share in stage.nodes if share.output_tokens is None)
        count = coverage.answers - coverage.token_counts
        yield (
            f"no believable count of the tokens of {_of(count, coverage.answers)}{nodes}: output tokens and their rates"
            " are unknown"
        )
    if coverage.prompt_counts < coverage.answers:
        nodes = _names(share.node for share in stage.nodes if share.prompt_tokens is None)
        count = coverage.answers - coverage.prompt_counts
        yield (
            f"no count of the prompt's tokens of {_of(count, coverage.answers)}{nodes}: prompt tokens and total"
            " tokens/s are unknown"
        )
    elif stage.cut and stage.prompt_tokens is None:
        yield f"{_answers(stage.cut)} cut before the server counted: prompt tokens and total tokens/s are unknown"
    if coverage.estimated:
        yield f"{_answers(coverage.estimated)} cut before the server counted: their tokens are estimated by the pieces"
    if stage.output_tokens is None and coverage.token_counts == coverage.answers:
        yield f"{_answers(stage.cut)} cut before the server counted: output tokens and their rates are unknown"
    if coverage.without_text:
        yield f"{_answers(coverage.without_text)} without any text: no TTFT, and not good"


def _clocks(stage: StageResult, coverage: Coverage) -> Iterator[str]:
    """The notes about the servers' clocks, and about the clock of the TPOT."""
    silent = coverage.answers - coverage.durations - coverage.contradicted
    if silent:
        nodes = _names(share.node for share in stage.nodes if share.server_tokens_per_s is None)
        yield (
            f"the server did not say how long it generated {_of(silent, coverage.answers)}{nodes}: its tok/s and its"
            " queue are unknown"
        )
    if coverage.contradicted:
        yield (
            f"the server's durations of {_of(coverage.contradicted, coverage.answers)} contradict the times measured"
            " here: they are not used"
        )
    if coverage.held_up:
        yield (
            f"held up on the way, or by this machine: {_of(coverage.held_up, coverage.answers)}, whose pieces took much"
            " longer to arrive than to generate"
        )
    if coverage.tpot_by_server and coverage.tpot_by_arrivals:
        yield f"TPOT is a mixture: {coverage.tpot_source}"
    if coverage.tpot_unknown:
        yield f"the TPOT of {_of(coverage.tpot_unknown, coverage.answers)} is unknown, and left out"


def _pieces(coverage: Coverage) -> Iterator[str]:
    """The notes about answers that have fewer pieces than tokens."""
    if coverage.large_pieces:
        yield (
            f"several tokens came in a piece in {_of(coverage.large_pieces, coverage.answers)}: inter-token latency is"
            " the time between pieces, not between tokens"
        )
    if coverage.hidden_tokens:
        yield (
            f"the server counted tokens that it did not send in {_of(coverage.hidden_tokens, coverage.answers)}, such"
            " as those of thinking: TTFT is the time to the first piece that it sent"
        )
    if coverage.unclear_pieces:
        yield (
            f"there are fewer pieces than tokens in {_of(coverage.unclear_pieces, coverage.answers)}: several tokens in"
            " a piece, or tokens that were not sent, such as those of thinking"
        )


def _lengths(coverage: Coverage) -> Iterator[str]:
    """The notes about answers and prompts of another length than was asked for."""
    if coverage.short:
        stopped = f" ({coverage.stopped} ended by the model)" if coverage.stopped else ""
        yield f"shorter than asked for: {_of(coverage.short, coverage.answers)}{stopped}"
    if coverage.long:
        yield f"longer than asked for: {_of(coverage.long, coverage.answers)}"
    if coverage.cut_prompts:
        yield (
            f"the server counted fewer tokens than words in prompts of {_of(coverage.cut_prompts, coverage.answers)}:"
            " it cut the prompt to its context, or counts only what was not in its cache"
        )


def _power(stage: StageResult) -> Iterator[str]:
    """The note about GPUs whose power is unknown."""
    if stage.gpu is not None and stage.gpu.power_w is None:
        yield f"the power of the GPUs is unknown{_names(stage.gpu.power_unknown)}: energy and tokens/J are unknown"


def _answers(count: int) -> str:
    return "1 answer was" if count == 1 else f"{count} answers were"


def _of(count: int, answers: int) -> str:
    """``count`` of all answers, in words."""
    if answers == 1:
        return "the only answer" if count else "no answer"
    return f"all {answers} answers" if count == answers else f"{count or 'none'} of {answers} answers"


def _names(nodes: Iterable[str]) -> str:
    """The names of the nodes in brackets; empty without nodes."""
    names = list(nodes)
    return f" ({join_some(names, MAX_NAMES)})" if names else ""
