"""Makes the sample of a request from the chunks of its answer, whether they are read at once or after the stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from gpumesh.backends.base import Chunk, ServerCounters
from gpumesh.bench.load.samples import LoadSample, SampleOutcome
from gpumesh.errors import GPUMeshError, StreamCut


@dataclass(slots=True)
class AnswerReading:
    """What was read of one answer. ``arrivals_s`` has the time of each piece, on any clock. ``text`` is the answer, for
    the next turn of its conversation or for a comparison; empty unless ``keeps_text``."""

    keeps_text: bool = False
    text: str = ""
    arrivals_s: list[float] = field(default_factory=list)
    counters: ServerCounters | None = None
    done_reason: str | None = None

    def add(self, chunk: Chunk, time_s: float) -> None:
        """Adds a chunk that arrived at ``time_s``."""
        if chunk.text or chunk.thinking:  # another chunk, such as the final one, is no piece of the answer
            self.arrivals_s.append(time_s)
            if self.keeps_text:
                self.text += chunk.text
        if chunk.done:
            self.counters, self.done_reason = chunk.counters, chunk.done_reason

    def make_sample(
        self,
        *,
        stage: str,
        index: int,
        start_s: float,
        intended_s: float,
        sent_s: float,
        ended_s: float,
        node: str | None,
        attempts: int,
        route: str | None = None,
        error: GPUMeshError | None = None,
        is_unfinished: bool = False,
        first_node: str | None = None,
    ) -> LoadSample:
        """Makes the request's sample. All times are on the clock of ``arrivals_s``; ``start_s`` is when the stage
        began. ``error``: why the answer did not end well. ``is_unfinished``: the run was ended before the answer.
        ``first_node`` began the answer; ``None``: as ``node``."""
        counters = self.counters
        if is_unfinished:
            outcome = SampleOutcome.UNFINISHED
        elif error is None:
            outcome = SampleOutcome.SERVED
        elif self.arrivals_s or isinstance(error, StreamCut):  # an answer can break off before its first piece
            outcome = SampleOutcome.CUT
        else:
            outcome = SampleOutcome.FAILED
        return LoadSample(
            stage=stage,
            index=index,
            outcome=outcome,
            intended_s=intended_s - start_s,
            sent_s=sent_s - start_s,
            ended_s=ended_s - start_s,
            node=node,
            attempts=attempts,
            route=route,
            arrivals_s=tuple(time_s - start_s for time_s in self.arrivals_s),
            tokens=None if counters is None else counters.tokens,
            prompt_tokens=None if counters is None else counters.prompt_tokens,
            counters=counters,
            done_reason=self.done_reason,
            error_code=None if error is None else error.code,
            error=None if error is None else error.message,
            first_node=first_node or node,
            text=self.text if self.keeps_text else None,
        )
