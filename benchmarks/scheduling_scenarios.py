"""The scenarios of the scheduling benchmark: the hosts, the work, and how the same work is routed by hand.

Each scenario is a row of issue 13's table. Its work depends only on the seed. "By hand" is a plan of somebody who knows
the work: each job names its node (``Job.hand``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from scheduling_work import Job

from gpumesh.lab.profile import LLAMA_8B, QWEN_7B, HostProfile, make_gpu, make_host

HOT, COLD = QWEN_7B.name, LLAMA_8B.name
LOAD_S = 4.0
SECOND = 50  # tokens that a stream of ``RATE`` writes in one second
RATE = float(SECOND)
WORDS = ("mesh", "node", "slot", "queue", "token", "prompt", "batch", "cache", "model", "load", "wait", "read")


class Figure(StrEnum):
    """The figure by which a scenario is compared with the work routed by hand."""

    MEAN = "mean_s"
    TTFT = "ttft_p50_s"
    MAKESPAN = "makespan_s"
    WATCHED = "watched_max_s"


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the table.

    ``today`` is what the issue measured. ``bound`` is its goal: how many times the figure by hand may be. ``limit_s``:
    how long after the start of the last job a request may still be answered. If ``watched_only``, the run ends with the
    watched requests, and by hand only they are sent: an ideal gateway would serve them as if they were alone.
    """

    name: str
    today: str
    hosts: tuple[HostProfile, ...]
    make_jobs: Callable[[random.Random], list[Job]]
    figure: Figure
    bound: float
    limit_s: float = 60.0
    watched_only: bool = False


def poisson(rng: random.Random, rate: float, seconds: float) -> Iterator[float]:
    """The times of Poisson arrivals, ``rate`` a second, before ``seconds``."""
    at_s = rng.expovariate(rate)
    while at_s < seconds:
        yield at_s
        at_s += rng.expovariate(rate)


def prose(rng: random.Random, words: int) -> str:
    """A text of so many words, which are the lab's tokens. Its first word is a number: no two are alike."""
    return f"{rng.getrandbits(48):x} " + " ".join(rng.choices(WORDS, k=words - 1))


def _small_gpu(profile: HostProfile) -> HostProfile:
    """The host with a GPU that holds one model at a time."""
    return replace(profile, gpus=(make_gpu(profile.name, memory_mib=8192),))


def _host(name: str, resident: str | None, **changes: Any) -> HostProfile:
    """A host of 4 slots and one small GPU, which has both models, ``resident`` in memory (``None``: none)."""
    models = tuple(replace(model, speed=1.0, resident=model.name == resident) for model in (QWEN_7B, LLAMA_8B))
    figures: dict[str, Any] = {
        "models": models,
        "tokens_per_s": RATE,
        "load_s": LOAD_S,
        "slots": 4,
        "ssh": False,
        **changes,
    }
    return _small_gpu(make_host(name, **figures))


def _second(rng: random.Random) -> int:
    """The tokens of an answer that takes half a second to one and a half: one second on average, with its prompt."""
    return rng.randint(SECOND // 2 - 2, 3 * SECOND // 2 - 2)


# -- two models, one in memory at a time -------------------------------------------------------------------------------

TWO_MODEL_HOSTS = (_host("a", HOT), _host("b", HOT), _host("c", HOT), _host("d", COLD))


def _two_models(rate: float) -> Callable[[random.Random], list[Job]]:
    """70 % of the requests for one model, 30 % for the other. By hand: three nodes in turn, and one node."""

    def make(rng: random.Random) -> list[Job]:
        jobs, hot = [], 0
        for at_s in poisson(rng, rate, 20.0):
            is_hot = rng.random() < 0.7
            hot += is_hot
            hand, model = (hot % 3, HOT) if is_hot else (3, COLD)
            jobs.append(Job(at_s, hand, model, (prose(rng, 100),), _second(rng)))
        return jobs

    return make


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("two-models-quarter", "6.4 s", TWO_MODEL_HOSTS, _two_models(4.0), Figure.MEAN, 1.25),
        Scenario("two-models-half", "25 s", TWO_MODEL_HOSTS, _two_models(8.0), Figure.MEAN, 1.25),
        Scenario("two-models-three-quarters", "", TWO_MODEL_HOSTS, _two_models(12.0), Figure.MEAN, 2.0),
    )
}
