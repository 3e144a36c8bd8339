"""The simulator beside the real gateway in front of the lab's stand-ins: the same requests, the same fleet.

    python benchmarks/simulator_beside_lab.py [WORK …] [--requests 500] [--seed 1] [--json FILE] [--check]

- independent: prompts that have nothing in common, three unequal nodes
- prefixes: conversations of five turns with shared system prompts, the same nodes, which keep what their slots lose
- loads: two models, three nodes that hold one model at a time; the shares of the models change

The stand-ins sleep in real time, so 500 requests take two to three minutes. All works run at the same time. A busy
machine adds to the times of the real gateway: run it on a quiet one. All times are seconds of latency, from the moment
at which a request should have been sent until its last token. The ratio is that of the means, lab / simulator; with
``--check`` the exit code is 1 if it is beyond 10 %, or if a request was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import uvloop  # noqa: E402
from lean_client import percentile  # noqa: E402
from scheduling import open_route  # noqa: E402
from scheduling_scenarios import LOAD_S, prose  # noqa: E402
from scheduling_work import Client, Job  # noqa: E402

from gpumesh.bench.simulate.fleet import ModelSpec, NodeSpec  # noqa: E402
from gpumesh.bench.simulate.requests import SimulatedRequest  # noqa: E402
from gpumesh.bench.simulate.simulation import Simulation  # noqa: E402
from gpumesh.lab.profile import LLAMA_8B, QWEN_7B, HostProfile, ModelProfile, make_host  # noqa: E402
from gpumesh.lab.text import render_messages  # noqa: E402

MODELS = (QWEN_7B, LLAMA_8B)
BOUND = 1.10
LIMIT_S = 120.0  # after the last request was sent
LONGEST_ANSWER = 400  # tokens
BLOCK_TOKENS = 16  # of the simulated prompts: their last parts are in no block, and no cache has them
ROUND_TRIP_S = 0.002  # gateway and stand-ins are on one machine


@dataclass(frozen=True, slots=True)
class Work:
    """A fleet, and how the jobs for it are made from a seed and a number of requests."""

    hosts: tuple[HostProfile, ...]
    make_jobs: Callable[[random.Random, int], list[Job]]


@dataclass(frozen=True, slots=True)
class Figures:
    """Times are in seconds, ``all_s`` is from the first request to the last answer. ``read`` is the share of the
    prompts' tokens that were not in a cache."""

    mean_s: float
    p50_s: float
    p99_s: float
    ttft_p50_s: float
    all_s: float
    loads: int
    read: float
    lost: int


# -- the works --------------------------------------------------------------------------------------------------------


def stand_in(name: str, tokens_per_s: float, slots: int, **changes: Any) -> HostProfile:
    """A host with one of its models in memory at a time, at the start ``QWEN_7B`` unless ``changes`` say otherwise. It
    reads one prompt at a time, its streams wait meanwhile, and slow each other down."""
    figures: dict[str, Any] = {
        "models": keep_resident(QWEN_7B),
        "max_loaded": 1,
        "load_s": LOAD_S,
        "tokens_per_s": tokens_per_s,
        "prefill_tokens_per_s": 40.0 * tokens_per_s,
        "slots": slots,
        "share": 0.3,
        "prefill_stalls": True,
        "answer_tokens": (LONGEST_ANSWER, LONGEST_ANSWER),  # so that each answer is as long as its request says
        "ssh": False,
    }
    return make_host(name, **{**figures, **changes})


def keep_resident(resident: ModelProfile) -> tuple[ModelProfile, ...]:
    """Both models, equally fast. This one is in memory."""
    return tuple(replace(model, speed=1.0, resident=model is resident) for model in MODELS)


def make_independent(rng: random.Random, count: int) -> list[Job]:
    return [
        Job(at_s, 0, QWEN_7B.name, (prose(rng, rng.randint(50, 1500)),), draw_answer(rng))
        for at_s in arrivals(rng, 4.0, count)
    ]


def make_conversations(rng: random.Random, count: int) -> list[Job]:
    """Each fifth of ``count`` is a conversation. Its turns are long, so that it matters where they are read."""
    systems = [prose(rng, 600) for _ in range(3)]
    turns = 5
    jobs = []
    for at_s in arrivals(rng, 2.5 / turns, count // turns):
        texts = tuple(prose(rng, rng.randint(100, 600)) for _ in range(turns))
        job = Job(at_s, 0, QWEN_7B.name, texts, draw_answer(rng))
        jobs.append(replace(job, system=rng.choice(systems), pause_s=rng.uniform(1.0, 5.0)))
    return jobs


def make_two_models(rng: random.Random, count: int) -> list[Job]:
    """Four of five requests are for one model; after half of them, for the other one."""
    jobs = []
    for number, at_s in enumerate(arrivals(rng, 3.0, count)):
        shares = (80, 20) if number < count // 2 else (20, 80)
        (model,) = rng.choices(MODELS, shares)
        jobs.append(Job(at_s, 0, model.name, (prose(rng, rng.randint(50, 300)),), draw_answer(rng)))
    return jobs


def arrivals(rng: random.Random, rate: float, count: int) -> Iterator[float]:
    at_s = 0.0
    for _ in range(count):
        at_s += rng.expovariate(rate)
        yield at_s


def draw_answer(rng: random.Random) -> int:
    """The tokens of an answer: many short ones and few long ones."""
    return max(1, min(int(rng.expovariate(1.0 / 60.0)), LONGEST_ANSWER))


UNEQUAL = (stand_in("a", 100.0, 4), stand_in("b", 50.0, 4), stand_in("c", 70.0, 2))
WORKS = {
    "independent": Work(UNEQUAL, make_independent),
    "prefixes": Work(tuple(replace(host, lost_tokens=65_000) for host in UNEQUAL), make_conversations),
    "loads": Work(
        tuple(stand_in(name, 60.0, 4, models=keep_resident(MODELS[name == "c"])) for name in "abc"), make_two_models
    ),
}


# -- the real gateway and the lab -------------------------------------------------------------------------------------


async def run_lab(work: Work, jobs: Sequence[Job], folder: Path) -> Figures:
    async with open_route(work.hosts, folder, ROOT) as (lab, port):
        assert port is not None
        client = Client(lambda _: ("127.0.0.1", port))
        await client.run(jobs, LIMIT_S)
        counters = await asyncio.gather(*(host.counters() for host in lab.hosts.values()))
    served = [sent for sent in client.sent if sent.ok]
    took = sorted(sent.took_s for sent in served)
    first = sorted(sent.first_at - sent.due_at for sent in served if sent.first_at is not None)
    logged = [entry for counter in counters for entry in counter.requests]
    return Figures(
        mean_s=sum(took) / len(took),
        p50_s=percentile(took, 0.5),
        p99_s=percentile(took, 0.99),
        ttft_p50_s=percentile(first, 0.5),
        all_s=max(sent.ended_at for sent in served) - min(sent.due_at for sent in served),
        loads=sum(counter.loads for counter in counters),
        read=sum(entry.read_tokens for entry in logged) / max(sum(entry.prompt_tokens for entry in logged), 1),
        lost=sum(len(job.turns) for job in jobs) - len(served),
    )


# -- the simulator ----------------------------------------------------------------------------------------------------


def run_simulation(work: Work, jobs: Sequence[Job]) -> Figures:
    measures = Simulation([make_node(host) for host in work.hosts], make_requests(jobs), "adaptive").run()
    result = measures.result()
    took, first = sorted(measures.completion_s), sorted(measures.ttft_s)
    return Figures(
        mean_s=sum(took) / len(took),
        p50_s=percentile(took, 0.5),
        p99_s=percentile(took, 0.99),
        ttft_p50_s=percentile(first, 0.5),
        all_s=result.makespan_s - min(job.at_s for job in jobs),
        loads=result.loads,
        read=result.read_share or 0.0,
        lost=result.lost,
    )


def make_node(host: HostProfile) -> NodeSpec:
    """The simulated node that is like this host of the lab."""
    assert host.tokens_per_s is not None
    assert host.prefill_tokens_per_s is not None
    models = {
        model.name: ModelSpec(
            model.name,
            host.tokens_per_s * model.speed,
            host.prefill_tokens_per_s * model.speed,
            host.load_s / model.speed,
            float(model.vram_mib),
            host.slots,
        )
        for model in host.models
    }
    return NodeSpec(
        host.name,
        models,
        loaded=tuple(model.name for model in host.models if model.resident),
        share=host.share,
        prefill_stall=1.0 if host.prefill_stalls else 0.0,
        prefill_lanes=1 if host.prefill_stalls else host.slots,
        lost_tokens=host.lost_tokens,
        vram_mib=None,  # the hosts have no SSH: nobody tells the gateway how much memory they have
        max_loaded=host.max_loaded or 3,
        context=host.context,
        keep_alive_s=host.keep_alive_s,
        rtt_s=ROUND_TRIP_S,
    )


def make_requests(jobs: Sequence[Job]) -> list[SimulatedRequest]:
    """The first turn of each job, each with the turns that follow it."""
    requests: list[SimulatedRequest] = []
    number = 0
    for job in sorted(jobs, key=lambda job: job.at_s):
        following: SimulatedRequest | None = None
        for turn in reversed(range(len(job.turns))):
            prompt, whole = render_words(job, turn, number)
            following = SimulatedRequest(
                number + turn,
                job.at_s,
                job.model,
                len(prompt),
                job.tokens,
                blocks=hash_blocks(prompt),
                end_blocks=hash_blocks(whole),
                block_tokens=BLOCK_TOKENS,
                next_turn=following,
                think_s=job.pause_s,
                max_tokens=job.tokens,
            )
        assert following is not None
        requests.append(following)
        number += len(job.turns)
    return requests


def render_words(job: Job, turn: int, number: int) -> tuple[list[str], list[str]]:
    """The words of this turn's prompt as the lab's template renders it, and those of the prompt with its answer. The
    answers are other words than those of the lab. ``number`` makes them differ from those of other jobs."""
    messages = [] if job.system is None else [{"role": "system", "content": job.system}]
    for index, said in enumerate(job.turns[: turn + 1]):
        messages.append({"role": "user", "content": said})
        answer = " ".join(f"answer-{number}-{index}-{word}" for word in range(job.tokens))
        if index < turn:
            messages.append({"role": "assistant", "content": answer})
    prompt = render_messages(messages, continues=True)
    return prompt.split(), f"{prompt}{answer}".split()


def hash_blocks(words: Sequence[str]) -> tuple[int, ...]:
    """The ids of the whole blocks: equal ids stand for texts that are equal from the first word on."""
    ids: list[int] = []
    for end in range(BLOCK_TOKENS, len(words) + 1, BLOCK_TOKENS):
        ids.append(hash((ids[-1] if ids else 0, *words[end - BLOCK_TOKENS : end])))
    return tuple(ids)


# ---------------------------------------------------------------------------------------------------------------------


async def measure(names: Sequence[str], requests: int, seed: int) -> dict[str, tuple[Figures, Figures]]:
    """The figures of the lab and of the simulator for each work."""
    jobs = {name: WORKS[name].make_jobs(random.Random(seed), requests) for name in names}
    # Short, because a runtime folder holds Unix sockets, whose paths are limited to 107 bytes.
    with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as folder:
        lab = await asyncio.gather(*(run_lab(WORKS[name], jobs[name], Path(folder) / name) for name in names))
    return {name: (figures, run_simulation(WORKS[name], jobs[name])) for name, figures in zip(names, lab, strict=True)}


def print_table(name: str, lab: Figures, simulated: Figures) -> None:
    columns = ("mean", "p50", "p99", "TTFT p50", "all", "loads", "read %", "lost")
    print(f"\n{name:<12}" + "".join(f"{column:>10}" for column in columns))
    for label, row in (("lab", lab), ("simulator", simulated)):
        cells = (
            *(f"{value:.3f}" for value in (row.mean_s, row.p50_s, row.p99_s, row.ttft_p50_s)),
            f"{row.all_s:.1f}",
            row.loads,
            f"{row.read * 100:.1f}",
            row.lost,
        )
        print(f"{label:<12}" + "".join(f"{cell:>10}" for cell in cells))
    print(f"lab / simulator, mean: {lab.mean_s / simulated.mean_s:.3f}", flush=True)


def agrees(lab: Figures, simulated: Figures) -> bool:
    return 1.0 / BOUND <= lab.mean_s / simulated.mean_s <= BOUND and not lab.lost and not simulated.lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", choices=[*WORKS, []], metavar="WORK", help=", ".join(WORKS))
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    parser.add_argument("--check", action="store_true", help="exit 1 if a mean differs by more than 10 %%")
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    results = uvloop.run(measure(given.works or list(WORKS), given.requests, given.seed))
    for name, (lab, simulated) in results.items():
        print_table(name, lab, simulated)
    if given.json is not None:
        figures = {name: {"lab": asdict(lab), "simulator": asdict(sim)} for name, (lab, sim) in results.items()}
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    differing = [name for name, (lab, simulated) in results.items() if not agrees(lab, simulated)]
    print(f"\nbeyond 10 %: {', '.join(differing) or 'none'}")
    return 1 if given.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
