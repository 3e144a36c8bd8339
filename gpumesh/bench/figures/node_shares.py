"""Computes what each node did in a stage, and its server's own times. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.figures.answers.answer import Answer
from gpumesh.bench.figures.answers.token_counts import TokenCounts, sum_prompt_tokens
from gpumesh.bench.figures.loaded_part import (
    LOAD_NOISE_MS,
    LoadedPart,
    count_waited_inside,
    load_seconds,
    mean_busy,
    most_at_once,
    token_rate,
)
from gpumesh.bench.stats import NO_VALUES, SampleSummary, summarize_sample

# A faster prefill is not believed: the prompt was in the server's cache, or the clock is wrong.
FASTEST_PREFILL_TOKENS_PER_S = 1_000_000.0


@dataclass(frozen=True, slots=True)
class NodeShare:
    """The part of a stage's served requests that one node served: ``served`` is their number, ``share`` from 0 to 1.

    ``server_tokens_per_s`` is the mean rate of its answers by the server's clock. While all slots of the stage were
    busy, the node gave ``loaded_tokens_per_s`` and worked on ``busy`` requests at once, on the mean (``None``: there
    was no such part). ``most_at_once`` is the largest number of answers that came from it at once. ``waited_inside`` is
    the number of requests that waited inside the server for a slot (``None``: the server does not tell), and ``load_s``
    are the seconds that requests waited for a load of the model.

    Three samples have one value for each answer for which the server gave it: ``wait_ms`` is the time in the queue
    inside the server, ``load_ms`` the time until the model was in memory, and ``prefill_tokens_per_s`` the rate at
    which the server read the prompt. ``cold_starts`` counts the answers whose model was not in memory. A sum of tokens
    is ``None`` if the count of one answer is unknown.
    """

    node: str
    served: int
    share: float
    output_tokens: int | None
    server_tokens_per_s: float | None = None
    loaded_tokens_per_s: float | None = None
    busy: float | None = None
    most_at_once: int = 0
    waited_inside: int | None = None
    load_s: float = 0.0
    prompt_tokens: int | None = None
    wait_ms: SampleSummary = NO_VALUES
    load_ms: SampleSummary = NO_VALUES
    prefill_tokens_per_s: SampleSummary = NO_VALUES
    cold_starts: int = 0


@dataclass(frozen=True, slots=True)
class ColdStart:
    """An answer that waited for its model: the stage, the node, and how long until the model was in memory, in ms."""

    stage: str
    node: str
    load_ms: float


def node_shares(
    served: Sequence[Answer],
    loaded: LoadedPart | None,
    token_counts: TokenCounts,
    *,
    shared_beginnings: bool = False,
) -> tuple[NodeShare, ...]:
    """The part of the served requests that each node has served, in the order of the nodes' names.

    ``loaded``: the part of the stage in which all slots were busy; ``None`` if there is none.
    ``shared_beginnings``: prompts of the stage begin alike, so a part of them may come from the server's cache.
    """
    by_node: dict[str, list[Answer]] = {}
    for answer in served:
        if answer.record.node is not None:
            by_node.setdefault(answer.record.node, []).append(answer)
    shares: list[NodeShare] = []
    for node, answers in sorted(by_node.items()):
        records = [answer.record for answer in answers]
        loads_ms = [answer.counters.load_ms for answer in answers]
        rates = (_prefill_rate(answer, shared_beginnings=shared_beginnings) for answer in answers)
        share = NodeShare(
            node,
            served=len(answers),
            share=len(answers) / len(served),
            output_tokens=token_counts.sum_of(answers),
            server_tokens_per_s=summarize_sample(answer.counters.tokens_per_s for answer in answers).mean,
            loaded_tokens_per_s=token_rate(answers, loaded, token_counts),
            busy=mean_busy(records, loaded),
            most_at_once=most_at_once(records),
            waited_inside=count_waited_inside(records),
            load_s=load_seconds(records),
            prompt_tokens=sum_prompt_tokens(answers),
            wait_ms=summarize_sample(answer.counters.waited_ms for answer in answers),
            load_ms=summarize_sample(loads_ms),
            prefill_tokens_per_s=summarize_sample(rates),
            cold_starts=sum(_is_cold(load_ms) for load_ms in loads_ms),
        )
        shares.append(share)
    return tuple(shares)


def find_cold_starts(answers: Sequence[Answer]) -> tuple[ColdStart, ...]:
    """The answers that waited for their model, in order."""
    return tuple(
        ColdStart(answer.record.stage, answer.record.node, answer.counters.load_ms)
        for answer in answers
        if answer.record.node is not None and answer.counters.load_ms is not None and _is_cold(answer.counters.load_ms)
    )


def _is_cold(load_ms: float | None) -> bool:
    return load_ms is not None and load_ms > LOAD_NOISE_MS


def _prefill_rate(answer: Answer, *, shared_beginnings: bool) -> float | None:
    """The tokens of the prompt that the server read ÷ the time that this took, in tokens/s; ``None`` if unknown.

    Tokens from the server's cache do not count, because the server did not read them.
    """
    counters = answer.counters
    if counters.prompt_tokens is None or not counters.prompt_ms:
        return None
    # A server that does not say how many tokens came from its cache counts as one without a cache. That is nearly true
    # for a prompt with a nonce at its start: it has only the beginning of the model's template in common with others.
    if counters.cached_tokens is None and shared_beginnings:
        return None
    read_tokens = counters.prompt_tokens - (counters.cached_tokens or 0)
    seconds = counters.prompt_ms / 1000.0
    return read_tokens / seconds if 0 < read_tokens <= FASTEST_PREFILL_TOKENS_PER_S * seconds else None
