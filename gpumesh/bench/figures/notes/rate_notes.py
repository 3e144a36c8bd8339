"""Says of which stages the rate is not one while all slots were busy, and which rounds were not full. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpumesh.bench.figures.summary import StageResult


def rate_notes(stages: Sequence[StageResult]) -> Iterator[str]:
    """Yields a sentence for each stage of a closed loop whose rates need one."""
    for stage in stages:
        level = stage.concurrency
        if level is None or level == 1 or stage.route is not None:
            continue
        if stage.rates.loaded_tokens_per_s is None:
            yield (
                f"stage {stage.name}: {stage.requests} requests are too few for {level} in flight: its rates are those"
                " of the whole stage, with its beginning and its end"
            )
        elif stage.requests % level:
            yield f"stage {stage.name}: {stage.requests} requests are no multiple of {level} in flight"
