"""Counts the tokens of a stage's answers. Pure.

The server's own count comes with the end of an answer. So an answer that was cut has no count: it is estimated from its
pieces, if the node's other answers agree how many tokens a piece has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from gpumesh.bench.figures.answers.answer import Answer
from gpumesh.bench.load.samples import SampleOutcome

# If the answers of a node differ by more in their tokens for each piece, their mean says little about one answer.
MAX_SPREAD = 1.1


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The tokens of answers. ``per_piece``: how many tokens a piece of each node has; nodes for which it is not known
    are left out. ``of_any_node`` is the same for an answer whose node is not known; ``None`` if the nodes differ."""

    per_piece: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    of_any_node: float | None = None

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> TokenCounts:
        """Learns the tokens of a piece from the complete answers of these."""
        by_node: dict[str, list[Answer]] = {}
        counted = [answer for answer in answers if answer.tokens is not None and answer.pieces]
        counted = [answer for answer in counted if answer.record.outcome is SampleOutcome.SERVED]
        for answer in counted:
            by_node.setdefault(answer.record.node or "", []).append(answer)
        per_piece = {node: _tokens_of_piece(of_node) for node, of_node in by_node.items()}
        known = {node: tokens for node, tokens in per_piece.items() if tokens is not None}
        return cls(MappingProxyType(known), _tokens_of_piece(counted))

    def tokens_of(self, answer: Answer) -> float | None:
        """The tokens of an answer; ``None`` if they are unknown. Those of an answer that was cut are an estimate."""
        if answer.tokens is not None:
            return answer.tokens
        if answer.record.outcome is SampleOutcome.SERVED:
            return None
        if not answer.pieces:
            return 0.0
        node = answer.record.node
        per_piece = self.of_any_node if node is None else self.per_piece.get(node)
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


def _tokens_of_piece(answers: Sequence[Answer]) -> float | None:
    """The mean number of tokens in a piece of these answers; ``None`` if they differ too much, or if there are none."""
    ratios = [(answer.tokens or 0) / answer.pieces for answer in answers]
    if not ratios or max(ratios) > MAX_SPREAD * min(ratios):
        return None
    return sum(answer.tokens or 0 for answer in answers) / sum(answer.pieces for answer in answers)


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
