"""``UsageCounts``: what requests have used; ``measure_tokens`` finds the tokens of one request. Pure.

The figures are the servers' own (``eval_count``, ``usage``). Where a server gives none, the frames of the stream are
counted, and the length of the prompt is estimated; such requests are counted as estimated. An answer that another node
has continued counts once, as its client has seen it.
"""

from __future__ import annotations

import re

import msgspec

from gpumesh.balancer.prefixes.cache_size import BYTES_PER_TOKEN
from gpumesh.gateway.observe.record import RequestRecord

EMBEDDING_ENDS = 512  # bytes at the end and the beginning of embeddings in which a server states the prompt's tokens
_PROMPT_COUNT = re.compile(rb'"(?:prompt_eval_count|prompt_tokens)"\s*:\s*([0-9]{1,9})\b')


class Tokens(msgspec.Struct, frozen=True, gc=False):
    """The tokens of one request. ``is_estimated``: the server has not counted all of them."""

    prompt: int = 0
    answer: int = 0
    is_estimated: bool = False


NO_TOKENS = Tokens()


class UsageCounts(msgspec.Struct):
    """Sums over requests. ``failed`` and ``cancelled`` are parts of ``requests``; ``estimated`` counts the requests
    whose tokens the server has not counted. ``energy_j`` is 0 if the power of no node is known."""

    requests: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    estimated: int = 0
    gpu_s: float = 0.0
    energy_j: float = 0.0

    def add(self, other: UsageCounts) -> None:
        """Adds the other counts to these."""
        self.requests += other.requests
        self.failed += other.failed
        self.cancelled += other.cancelled
        self.prompt_tokens += other.prompt_tokens
        self.answer_tokens += other.answer_tokens
        self.estimated += other.estimated
        self.gpu_s += other.gpu_s
        self.energy_j += other.energy_j


def measure_tokens(record: RequestRecord) -> Tokens:
    """The tokens that a request has used: by the server's counts, or estimated where the server gave none. An error
    of a server has used no tokens. If the client left before the answer was complete, the tokens that had already come
    from the server are counted."""
    answer = record.answer
    if answer is None or answer.status >= 400:
        return NO_TOKENS
    counters, body = answer.counters, answer.body
    if counters is not None and counters.prompt_tokens is not None and counters.tokens is not None:
        return Tokens(counters.prompt_tokens, counters.tokens)
    prompt_tokens = None if counters is None else counters.prompt_tokens
    answer_tokens = None if counters is None else counters.tokens
    if prompt_tokens is None and body is not None:
        prompt_tokens = _find_prompt_count(body)
        if prompt_tokens is not None and answer_tokens is None:
            return Tokens(prompt_tokens)  # embeddings: they have no tokens of an answer
    if prompt_tokens is None:
        placement = record.progress.placement
        expected_tokens = 0.0 if placement is None else placement.placed.work.prompt_tokens
        prompt_tokens = round(expected_tokens or record.body_bytes / BYTES_PER_TOKEN)
    if answer_tokens is None:
        answer_tokens = answer.streamed_tokens
    return Tokens(prompt_tokens, answer_tokens, is_estimated=True)


def _find_prompt_count(body: bytes) -> int | None:
    """The server's count of the tokens of the prompt in an answer with embeddings; ``None`` if there is none. The count
    is near the start or the end of the body. The rest is not searched: it may have millions of numbers."""
    match = _PROMPT_COUNT.search(body[-EMBEDDING_ENDS:]) or _PROMPT_COUNT.search(body[:EMBEDDING_ENDS])
    return None if match is None else int(match[1])
