"""Counts for how many answers each figure of a stage is known, and which answers are not as was asked for. Pure.

``coverage_notes`` makes the sentences from these counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.figures.answers.answer import Answer, Hidden, TpotSource
from gpumesh.bench.figures.answers.token_counts import TokenCounts
from gpumesh.bench.load.samples import SampleOutcome
from gpumesh.bench.workload.stages import PlannedRequest, Stage


@dataclass(frozen=True, slots=True)
class Coverage:
    """Numbers of a stage's ``answers``, which are its served requests; only ``estimated`` counts those that were cut.

    - ``token_counts``, ``prompt_counts``, ``durations``: the server gave the number of tokens, the number of the
      prompt's tokens, the duration of the generation, and the figure is believed.
    - ``contradicted``: the server's durations do not fit what was seen here, so they are not used.
    - ``held_up``: the pieces took much longer to arrive than the server took to generate them.
    - ``tpot_by_server``, ``tpot_by_arrivals``, ``tpot_unknown``: by which clock the TPOT is. An answer of one token
      is in none of them.
    - ``large_pieces``, ``hidden_tokens``, ``unclear_pieces``: the answer has fewer pieces than tokens. Several tokens
      come in a piece; the server counts tokens that it does not send; one of the two.
    - ``without_text``: no piece came, so there is no TTFT.
    - ``estimated``: the tokens of an answer that was cut are estimated from its pieces.
    - ``short``, ``long``: the answer has fewer, or more, tokens than were asked for. ``stopped`` is the part of
      ``short`` in which the model itself ended the answer.
    - ``cut_prompts``: the server counts fewer tokens than the prompt has words.
    """

    answers: int
    token_counts: int
    prompt_counts: int
    durations: int
    contradicted: int = 0
    held_up: int = 0
    tpot_by_server: int = 0
    tpot_by_arrivals: int = 0
    tpot_unknown: int = 0
    large_pieces: int = 0
    hidden_tokens: int = 0
    unclear_pieces: int = 0
    without_text: int = 0
    estimated: int = 0
    short: int = 0
    long: int = 0
    stopped: int = 0
    cut_prompts: int = 0

    @property
    def tpot_source(self) -> str | None:
        """The clock of the TPOT in words; ``None`` if no answer has a TPOT. A mixture has the number of each clock."""
        if self.tpot_by_server and self.tpot_by_arrivals:
            return f"{self.tpot_by_server} by the server's clock, {self.tpot_by_arrivals} by arrivals"
        if self.tpot_by_server:
            return "the server's clock"
        return "arrivals" if self.tpot_by_arrivals else None


def coverage_of(stage: Stage, answers: Sequence[Answer], token_counts: TokenCounts) -> Coverage:
    """Counts the answers of a stage, or of one of its routes."""
    served = [answer for answer in answers if answer.record.outcome is SampleOutcome.SERVED]
    cut = [answer for answer in answers if answer.record.outcome is SampleOutcome.CUT and answer.pieces]
    planned = [(answer, _find_planned(stage, answer)) for answer in served]
    short = [answer for answer, request in planned if _excess_tokens(answer, request) < 0]
    return Coverage(
        answers=len(served),
        token_counts=sum(answer.tokens is not None for answer in served),
        prompt_counts=sum(answer.counters.prompt_tokens is not None for answer in served),
        durations=sum(answer.counters.eval_ms is not None for answer in served),
        contradicted=sum(answer.contradicted for answer in served),
        held_up=sum(answer.held_up for answer in served),
        tpot_by_server=sum(answer.tpot_source is TpotSource.SERVER for answer in served),
        tpot_by_arrivals=sum(answer.tpot_source is TpotSource.ARRIVALS for answer in served),
        tpot_unknown=sum(answer.lacks_tpot for answer in served),
        large_pieces=sum(answer.hidden is Hidden.LARGE_PIECES for answer in served),
        hidden_tokens=sum(answer.hidden is Hidden.TOKENS for answer in served),
        unclear_pieces=sum(answer.hidden is Hidden.UNKNOWN and answer.has_count_and_pieces for answer in served),
        without_text=sum(answer.pieces == 0 for answer in served),
        estimated=sum(token_counts.tokens_of(answer) is not None for answer in cut if answer.tokens is None),
        short=len(short),
        long=sum(_excess_tokens(answer, request) > 0 for answer, request in planned),
        stopped=sum(answer.record.done_reason == "stop" for answer in short),
        cut_prompts=sum(_is_prompt_cut(answer, request) for answer, request in planned),
    )


def _find_planned(stage: Stage, answer: Answer) -> PlannedRequest | None:
    """The request as it was planned; ``None`` if the stage does not have it."""
    index = answer.record.index
    return stage.requests[index] if 0 <= index < len(stage.requests) else None


def _excess_tokens(answer: Answer, planned: PlannedRequest | None) -> int:
    """How many tokens the answer has more than were asked for (below 0: fewer); 0 if one of the two is unknown.

    One token more or less is no difference: some servers count the token that ends the answer.
    """
    asked = planned.chat.options.get("num_predict") if planned is not None else None
    if answer.tokens is None or not isinstance(asked, int) or asked < 1:
        return 0
    excess = answer.tokens - asked
    return excess if abs(excess) > 1 else 0


def _is_prompt_cut(answer: Answer, planned: PlannedRequest | None) -> bool:
    """Whether the server counted fewer tokens than the prompt has words: every word is a token at least."""
    counted = answer.counters.prompt_tokens
    if planned is None or counted is None:
        return False
    return counted < sum(len(message.content.split()) for message in planned.chat.messages)


def prompts_share_beginnings(stage: Stage) -> bool:
    """Whether prompts of the stage begin alike: two with the same first word, or turns of one conversation. A nonce of
    its own makes a prompt's first word unlike all others."""
    first_words = [
        " ".join(request.chat.messages[0].content.split(maxsplit=1)[:1])
        for request in stage.requests
        if request.chat.messages
    ]
    has_conversations = any(request.conversation is not None for request in stage.requests)
    return has_conversations or len(set(first_words)) < len(first_words)
