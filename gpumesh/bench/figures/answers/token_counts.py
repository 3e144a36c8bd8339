"""Counts the tokens of a stage's answers. Pure.

The server's own count comes with the end of an answer. So an answer that was cut has no count: it is estimated from its
pieces, if the node's other answers agree how many tokens a piece has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gpumesh.bench.figures.answers.answer import Answer
from gpumesh.bench.load.samples import SampleOutcome

# If the answers of a node differ by more in their tokens for each piece, their mean says little about one answer.
MAX_SPREAD = 1.1


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The tokens of answers. ``per_piece``: how many tokens a piece of each node has; nodes for which it is not known
    are left out."""

    per_piece: Mapping[str | None, float] = field(default_factory=dict)

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> TokenCounts:
        """Learns the tokens of a piece from the complete answers of these."""
        by_node: dict[str | None, list[tuple[int, int]]] = {}
        for answer in answers:
            if answer.tokens is not None and answer.pieces and answer.record.outcome is SampleOutcome.SERVED:
                by_node.setdefault(answer.record.node, []).append((answer.tokens, answer.pieces))
        per_piece: dict[str | None, float] = {}
        for node, counts in by_node.items():
            ratios = [tokens / pieces for tokens, pieces in counts]
            if max(ratios) <= MAX_SPREAD * min(ratios):
                per_piece[node] = sum(tokens for tokens, _ in counts) / sum(pieces for _, pieces in counts)
        return cls(per_piece)

    def tokens_of(self, answer: Answer) -> float | None:
        """The tokens of an answer; ``None`` if they are unknown. Those of an answer that was cut are an estimate."""
        if answer.tokens is not None:
            return answer.tokens
        if answer.record.outcome is SampleOutcome.SERVED:
            return None
        if not answer.pieces:
            return 0.0
        per_piece = self.per_piece.get(answer.record.node)
        return None if per_piece is None else per_piece * answer.pieces

    def sum_of(self, answers: Iterable[Answer]) -> int | None:
        """The tokens of all these answers; ``None`` if those of one answer are unknown."""
        total = 0.0
        for answer in answers:
            tokens = self.tokens_of(answer)
            if tokens is None:
                return None
            total += tokens
        return round(total)

    def between(self, answers: Iterable[Answer], start_s: float, end_s: float) -> float | None:
        """The number of tokens that arrived from ``start_s`` to ``end_s`` (seconds of the stage).

        All pieces of an answer count as equal shares of the answer's tokens. ``None`` if the tokens of an answer that
        had pieces in this time are unknown.
        """
        counts: list[float] = []
        for answer in answers:
            pieces = sum(start_s <= arrival_s < end_s for arrival_s in answer.record.arrivals_s)
            if pieces:
                tokens = self.tokens_of(answer)
                if tokens is None:
                    return None
                counts.append(tokens * pieces / answer.pieces)
        return math.fsum(counts)


def sum_prompt_tokens(answers: Iterable[Answer]) -> int | None:
    """The tokens of the prompts, by the servers' counts; ``None`` if the count of one prompt is unknown.

    A request that failed before its answer began counts 0.
    """
    total = 0
    for answer in answers:
        if answer.record.outcome is SampleOutcome.FAILED:
            continue
        if answer.counters.prompt_tokens is None:
            return None
        total += answer.counters.prompt_tokens
    return total
