"""The scenarios of the scheduling benchmark: the hosts, the work, and how the same work is routed by hand.

Each scenario is work that an earlier balancer got wrong. Its work depends only on the seed. "By hand" is a plan of
somebody who knows the work: each job names its node (``Job.hand``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from scheduling_work import Job

from gpumesh.lab.profile import LLAMA_8B, QWEN_7B, HostProfile, make_host

HOT, COLD = QWEN_7B.name, LLAMA_8B.name
LOAD_S = 4.0
SECOND = 50  # tokens that a stream writes in one second
WORDS = ("mesh", "node", "slot", "queue", "token", "prompt", "batch", "cache", "model", "load", "wait", "read")


class Figure(StrEnum):
    """The figure by which a scenario is compared with the work routed by hand."""

    MEAN = "mean_s"
    TTFT = "ttft_p50_s"
    READ = "read_share"
    MAKESPAN = "makespan_s"
    WATCHED = "watched_max_s"


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the table.

    ``today`` is what the issue measured. ``bound`` is its goal: how many times each of ``figures`` by hand may be.
    ``at_most`` are goals for figures themselves, by their names. ``limit_s``: how long after the start of the last job
    a request may still be answered. If ``watched_only``, the run ends with the watched requests, and by hand only they
    are sent: an ideal gateway would serve them as if they were alone.
    """

    name: str
    today: str
    hosts: tuple[HostProfile, ...]
    make_jobs: Callable[[random.Random], list[Job]]
    figures: tuple[Figure, ...]
    bound: float
    at_most: Mapping[str, float] = field(default_factory=dict)
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


def _host(name: str, resident: str | None, **changes: Any) -> HostProfile:
    """A host of 4 slots that holds one of two models at a time, first ``resident`` (``None``: none).

    A stream writes ``SECOND`` tokens a second, and reads a prompt at 2,000 tokens/s.
    """
    models = tuple(replace(model, speed=1.0, resident=model.name == resident) for model in (QWEN_7B, LLAMA_8B))
    figures: dict[str, Any] = {
        "models": models,
        "max_loaded": 1,
        "slots": 4,
        "tokens_per_s": float(SECOND),
        "prefill_tokens_per_s": 2000.0,
        "load_s": LOAD_S,
        "ssh": False,
    }
    return make_host(name, **{**figures, **changes})


def _about_a_second(rng: random.Random) -> int:
    """The tokens of an answer that takes half a second to one and a half, with its short prompt one on average."""
    return rng.randint(SECOND // 2 - 2, 3 * SECOND // 2 - 2)


def _mixed_length(rng: random.Random) -> int:
    """The tokens of an answer: many short ones and few long ones, up to four seconds, one second on average."""
    return min(1 + int(rng.expovariate(1.0 / (SECOND - 3))), 4 * SECOND)


# -- what is in memory ------------------------------------------------------------------------------------------------

TWO_MODEL_HOSTS = (_host("a", HOT), _host("b", HOT), _host("c", HOT), _host("d", COLD))


def _two_models(rate: float) -> Callable[[random.Random], list[Job]]:
    """70 % of the requests for one model, 30 % for the other. By hand: three nodes in turn, and one node."""

    def make(rng: random.Random) -> list[Job]:
        jobs, hot = [], 0
        for at_s in poisson(rng, rate, 20.0):
            is_hot = rng.random() < 0.7
            hot += is_hot
            hand, model = (hot % 3, HOT) if is_hot else (3, COLD)
            jobs.append(Job(at_s, hand, model, (prose(rng, 100),), _mixed_length(rng)))
        return jobs

    return make


def _num_ctx(rng: random.Random) -> list[Job]:
    """Two clients that differ in ``num_ctx`` only. By hand: each has a node."""
    jobs = []
    for at_s in poisson(rng, 2.0, 25.0):
        client = rng.randrange(2)
        options = {"num_ctx": (4096, 8192)[client]}
        jobs.append(Job(at_s, client, HOT, (prose(rng, 100),), _mixed_length(rng), options=options))
    return jobs


# -- what is in the caches --------------------------------------------------------------------------------------------


def _conversations(rng: random.Random) -> list[Job]:
    """24 conversations of 6 turns with 3 system prompts. By hand: each conversation has a node, and of each system
    prompt six conversations share one; the last two of each are on the fourth node."""
    systems = [prose(rng, 400) for _ in range(3)]
    jobs = []
    for number in range(24):
        system, of_system = number % 3, number // 3
        turns = tuple(prose(rng, 200) for _ in range(6))
        job = Job(rng.uniform(0.0, 18.0), system if of_system < 6 else 3, HOT, turns, SECOND)
        jobs.append(replace(job, system=systems[system], pause_s=rng.uniform(0.5, 1.5)))
    return jobs


# -- who is next ------------------------------------------------------------------------------------------------------


def _interactive_behind_batch(rng: random.Random) -> list[Job]:
    """500 batch requests at once, and an interactive one after 10 and after 65 s.

    After 60 s, the age of a batch request once counted for more than the class of an interactive one.
    """
    jobs = [
        Job(0.0, 0, HOT, (prose(rng, 50),), _about_a_second(rng), headers={"X-GPUMesh-Priority": "batch"})
        for _ in range(500)
    ]
    interactive = {"X-GPUMesh-Priority": "interactive"}
    return jobs + [
        Job(at_s, 0, HOT, (prose(rng, 50),), SECOND, headers=interactive, watched=True) for at_s in (10.0, 65.0)
    ]


def _interactive_full_queue(rng: random.Random) -> list[Job]:
    """More batch requests than the queue takes, all the time, and an interactive one each second: none is refused."""
    batch = [0.0] * 900 + list(poisson(rng, 10.0, 20.0))  # `max_queue` has room for 716 of them
    headers = {"X-GPUMesh-Priority": "batch"}
    jobs = [Job(at_s, 0, HOT, (prose(rng, 50),), _about_a_second(rng), headers=headers) for at_s in batch]
    interactive = {"X-GPUMesh-Priority": "interactive"}
    return jobs + [
        Job(float(at_s), 0, HOT, (prose(rng, 50),), SECOND, headers=interactive, watched=True) for at_s in range(2, 20)
    ]


def _second_client(rng: random.Random) -> list[Job]:
    """200 requests of one client at once, and three of another one a little later."""
    first = {"X-GPUMesh-Client": "first"}
    jobs = [Job(0.0, 0, HOT, (prose(rng, 50),), rng.randint(20, 40), headers=first) for _ in range(200)]
    second = {"X-GPUMesh-Client": "second"}
    return jobs + [Job(at_s, 0, HOT, (prose(rng, 50),), 30, headers=second, watched=True) for at_s in (2.0, 6.0, 10.0)]


# -- how many at a time -----------------------------------------------------------------------------------------------


def _fresh_slots(rng: random.Random) -> list[Job]:
    """32 streams of one second, at once."""
    return [Job(0.0, number % 2, HOT, (prose(rng, 50),), SECOND) for number in range(32)]


def _four_slots(rng: random.Random) -> list[Job]:
    """100 requests at once."""
    return [Job(0.0, 0, HOT, (prose(rng, 50),), _about_a_second(rng)) for _ in range(100)]


UNEQUAL_HOSTS = tuple(_host(name, HOT, slots=2, tokens_per_s=rate) for name, rate in (("fast", 100.0), ("slow", 50.0)))


def _unequal(rng: random.Random) -> list[Job]:
    """Mixed prompts and answers, all at once. By hand: the longest first, each to the node that would end it first."""
    jobs = [Job(0.0, 0, HOT, (prose(rng, rng.randint(20, 600)),), rng.randint(20, 150)) for _ in range(80)]
    free_at = [(0.0, node) for node, host in enumerate(UNEQUAL_HOSTS) for _ in range(host.slots)]
    planned: dict[int, Job] = {}
    by_length = sorted(range(len(jobs)), key=lambda number: _seconds(jobs[number], UNEQUAL_HOSTS[0]), reverse=True)
    for order, number in enumerate(by_length):
        ends = [(since + _seconds(jobs[number], UNEQUAL_HOSTS[node]), node) for since, node in free_at]
        slot = ends.index(min(ends))
        free_at[slot] = ends[slot]
        planned[number] = replace(jobs[number], hand=ends[slot][1], hand_order=order)
    return [planned[number] for number in range(len(jobs))]


def _seconds(job: Job, host: HostProfile) -> float:
    """How long the job takes on an idle host of one model."""
    assert host.prefill_tokens_per_s is not None
    assert host.tokens_per_s is not None
    return len(job.turns[0].split()) / host.prefill_tokens_per_s + job.tokens / host.tokens_per_s


# ---------------------------------------------------------------------------------------------------------------------

RESIDENT = (_host("a", HOT), _host("b", HOT), _host("c", HOT), _host("d", HOT))
CACHING = tuple(
    replace(host, prefill_stalls=True, lost_tokens=65_000, prefill_tokens_per_s=3000.0) for host in RESIDENT
)
WIDE = tuple(replace(host, slots=32) for host in RESIDENT[:2])

ALL = (
    Scenario("two-models-quarter", "mean 6.4 s", TWO_MODEL_HOSTS, _two_models(4.0), (Figure.MEAN,), 1.25),
    Scenario("two-models-half", "mean 25 s", TWO_MODEL_HOSTS, _two_models(8.0), (Figure.MEAN,), 1.25),
    Scenario("two-models-three-quarters", "", TWO_MODEL_HOSTS, _two_models(12.0), (Figure.MEAN,), 2.0),
    Scenario("num-ctx", "mean 8.7 s", (_host("a", None), _host("b", None)), _num_ctx, (Figure.MEAN,), 1.25),
    Scenario("conversations", "38 % read", CACHING, _conversations, (Figure.TTFT, Figure.READ), 1.25),
    Scenario(
        "interactive-behind-batch",
        "59 s",
        RESIDENT[:1],
        _interactive_behind_batch,
        (Figure.WATCHED,),
        2.5,  # the end of one answer, at most 1.5 s, and its own second
        limit_s=90.0,
        watched_only=True,
    ),
    Scenario(
        "interactive-full-queue",
        "",
        RESIDENT[:1],
        _interactive_full_queue,
        (Figure.WATCHED,),
        2.5,
        watched_only=True,
    ),
    Scenario(
        "second-client",
        "46 s",
        RESIDENT[:1],
        _second_client,
        (Figure.WATCHED,),
        5.0,
        at_most={"watched_max_s": 3.0},
        watched_only=True,
    ),
    Scenario("fresh-slots", "5.0 s in all", WIDE, _fresh_slots, (Figure.MAKESPAN,), 1.25),
    Scenario("unequal-makespan", "", UNEQUAL_HOSTS, _unequal, (Figure.MAKESPAN,), 1.05),
    Scenario(
        "four-slots",
        "",
        RESIDENT[:1],
        _four_slots,
        (Figure.MAKESPAN,),
        1.25,
        at_most={"answers_before_full": 5, "waited_inside": 1},
    ),
)
SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for scenario in ALL}
