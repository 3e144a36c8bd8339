"""Says the figures of a failover in sentences, for the table and for the report. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from gpumesh.bench.figures.outages.failover import OUTAGE_WORDS, FailoverFigures


def failover_sentences(figures: FailoverFigures) -> Iterator[str]:
    """Yields a line for each question: when was it noticed, what became of requests, what did clients see, when was it
    back?"""
    avoided = "no request that avoided it was seen"
    if figures.avoided_ms is not None:
        avoided = f"the first request that avoided it came after {_ms(figures.avoided_ms)}"
    yield f"{figures.node}, {OUTAGE_WORDS[figures.by]}: noticed after {_ms(figures.noticed_ms)}; {avoided}"
    last_tried = "" if figures.last_tried_ms is None else f"; the last that met it, after {_ms(figures.last_tried_ms)}"
    yield (
        f"requests: {figures.continued} continued, {figures.retried} retried,"
        f" {figures.cut} cut, {figures.failed} failed{last_tried}"
    )
    yield (
        f"clients: longest gap {_ms(figures.longest_gap_ms)} ({_ms(figures.usual_gap_ms)} before),"
        f" longest wait for a first token {_ms(figures.longest_ttft_ms)}"
    )
    yield f"tokens of continued answers: {_tokens(figures)}"
    if figures.back_s is not None:
        yield f"put back: healthy after {_ms(figures.healthy_ms)}, its first token after {_ms(figures.serves_ms)}"


def _tokens(figures: FailoverFigures) -> str:
    """What clients got twice or not at all, and how that is known."""
    if not figures.continued:
        return "there was none"
    check = figures.text_check
    how = "by counts"
    if figures.counted_by == "text" and check is not None:
        how = f"by text, of {check.compared} asked for again"
    other = ""
    if check is not None and check.other_texts:
        other = f"; {check.other_texts} of {check.compared} went on with other words than undisturbed"
    elif check is not None and check.is_deterministic is False:
        other = "; no text is compared: the same prompt is not answered alike twice"
    if figures.tokens_repeated is None:
        return f"what was repeated or lost is unknown{other}"
    return f"{figures.tokens_repeated} repeated, {figures.tokens_lost} lost ({how}){other}"


def _ms(value: float | None) -> str:
    """A time for a person: "84 ms", "2.3 s", or "unknown"."""
    if value is None:
        return "an unknown time"
    return f"{value:.0f} ms" if value < 1000.0 else f"{value / 1000.0:.1f} s"
