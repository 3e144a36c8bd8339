"""The scenarios of a benchmark, and its settings. Values only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from gpumesh.bench.workload.arrivals import ArrivalProcess
from gpumesh.bench.workload.lengths import Lengths
from gpumesh.errors import UsageError

MAX_PROMPT_TOKENS = 200_000  # a larger number is taken for a mistake: few models read more


class Scenario(StrEnum):
    """What a benchmark measures. The files in ``scenarios/`` say what each scenario does."""

    QUICK = "quick"
    SWEEP = "sweep"
    SCALE = "scale"
    OVERHEAD = "overhead"
    FAILOVER = "failover"
    REPLAY = "replay"
    LOAD = "load"


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """The settings of a benchmark, as `bench run` has them as options.

    ``requests`` is the number for each stage. ``concurrency`` holds the levels of ``sweep``; other scenarios use the
    first level. If one of these two is not given (``None``, empty), each scenario has its own default. ``tokens`` and
    ``prompt_tokens`` are the lengths of an answer and of a prompt. ``think``: whether a model that can think shall
    think; ``None``: the server's default. ``seed`` decides the words of the prompts, and is sent to the servers.
    ``speed`` divides the gaps between a trace's requests. ``max_context`` limits the length of replayed prompts, in
    tokens.

    ``answer_lengths`` and ``prompt_lengths``: the distributions from which these lengths are drawn, if they are not all
    equal; ``tokens`` and ``prompt_tokens`` are their means. The others shape the scenario ``load``: ``rate`` (requests
    per second; ``None``: a closed loop), ``arrivals`` and ``burst`` (``arrivals.py``), and ``duration_s``, after which
    no more is sent. ``turns``: above 1, each request begins a conversation of so many turns, with ``think_s`` between
    an answer and the next turn. ``system_tokens``: all prompts begin with the same system prompt of this length.
    """

    model: str
    requests: int | None = None
    concurrency: tuple[int, ...] = ()
    tokens: int = 64
    prompt_tokens: int = 32
    think: bool | None = False
    seed: int = 1
    speed: float = 1.0
    max_context: int = 8192
    answer_lengths: Lengths | None = None
    prompt_lengths: Lengths | None = None
    rate: float | None = None
    arrivals: ArrivalProcess = ArrivalProcess.POISSON
    burst: int = 1
    duration_s: float | None = None
    turns: int = 1
    think_s: float = 0.0
    system_tokens: int = 0

    def check(self) -> None:
        """Raises UsageError for a value that makes no sense. The error names the option of `bench run`."""
        for option, value in (
            ("-n", self.requests),
            ("--tokens", self.tokens),
            ("--prompt-tokens", self.prompt_tokens),
            ("-c", min(self.concurrency, default=None)),  # the smallest level; the other levels are larger
            ("--burst", self.burst),
            ("--turns", self.turns),
        ):
            if value is not None and value < 1:  # ``None``: not given, so the scenario's default is used
                raise UsageError(f"{option} must be at least 1, not {value}")
        if self.system_tokens < 0 or not 0 <= self.think_s < math.inf:
            raise UsageError("--system-tokens and --think-time are not negative")
        if self.speed <= 0:
            raise UsageError(f"--speed must be more than 0, not {self.speed:g}")
        for option, number in (("--rate", self.rate), ("--duration", self.duration_s)):
            if number is not None and not 0 < number < math.inf:
                raise UsageError(f"{option} must be more than 0, not {number:g}")
        if self.prompt_tokens > MAX_PROMPT_TOKENS:
            raise UsageError(f"--prompt-tokens can be {MAX_PROMPT_TOKENS} at most, not {self.prompt_tokens}")
