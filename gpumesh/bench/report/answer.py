"""The answer of a benchmark in plain sentences, for the report and the terminal. Pure.

A sentence is there only if the figures that it needs are known. Names come from hosts and files: the code that shows a
sentence makes its text printable.
"""

from __future__ import annotations

from gpumesh.bench.results.result import BenchResult


def partial_sentence(result: BenchResult) -> str | None:
    """Says that a result is partial, why, and how far its last stage came; ``None`` for a whole result."""
    if not result.partial:
        return None
    reason = result.partial_reason or "the run still goes on, or it was killed"
    unfinished = [stage for stage in result.stages if stage.partial]
    if not result.stages:
        return f"Partial result: {reason}. Nothing was measured."
    if not unfinished:
        return f"Partial result: {reason}. Each stage that is shown is whole."
    stage = unfinished[0]  # several only if it has routes
    ended = sum(part.requests - part.unfinished for part in unfinished)
    of_planned = "" if stage.planned is None else f" of {stage.planned}"
    return f"Partial result: {reason}. In stage {stage.name}, {ended}{of_planned} requests had ended."
