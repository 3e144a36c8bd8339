"""The simulated server beside the lab's stand-in (``gpumesh/lab/inference/``): the same requests take the same times.

Both are written for the same facts (docs/internals/ollama.md) and share no code. The stand-in runs in virtual time.
``benchmarks/simulator_beside_lab.py`` compares them as wholes: with the real gateway, in real time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import pytest

from gpumesh.bench.simulate.fleet import ModelSpec, NodeSpec
from gpumesh.lab.inference.engine import Engine
from gpumesh.lab.profile import LLAMA_8B, QWEN_7B, HostProfile, ModelProfile, make_host
from tests.bench.simulate.server_driver import ServerDriver
from tests.lab.virtual_time import run_in_virtual_time

A, B = replace(QWEN_7B, speed=1.0, resident=True), replace(LLAMA_8B, speed=1.0)
HOST = make_host(
    "one",
    models=(A, B),
    tokens_per_s=100.0,
    prefill_tokens_per_s=2000.0,
    load_s=4.0,
    slots=3,
    max_loaded=1,
    share=0.3,
    prefill_stalls=True,
)
BLOCK_TOKENS = 50
FIRST_LETTER = 0x4E00  # of thousands of Chinese letters
SEEDS = (3, 4, 5)  # of others, two answers end within 1 ms, and each side frees another slot first
ROUNDING_S = 0.02  # the stand-in's timers may fire 1 ms early; such errors add up while the server is busy


@dataclass(frozen=True)
class Sent:
    """A request: its prompt is ``blocks``, each a text of ``BLOCK_TOKENS`` words that depends on its number alone. Two
    of them differ in their first letter."""

    at_s: float
    model: ModelProfile
    blocks: tuple[int, ...]
    tokens: int
    context: int | None = None

    @property
    def prompt(self) -> str:
        return "".join(chr(FIRST_LETTER + block) + " word" * (BLOCK_TOKENS - 1) + " " for block in self.blocks)

    @property
    def block_ids(self) -> tuple[int, ...]:
        return tuple(hash(self.blocks[: count + 1]) for count in range(len(self.blocks)))


def run_lab(host: HostProfile, sent: Sequence[Sent]) -> list[float]:
    """When each request ends on the stand-in's engine."""
    ends = [0.0] * len(sent)

    async def send(engine: Engine, number: int, one: Sent) -> None:
        await asyncio.sleep(one.at_s)
        options: dict[str, object] = {} if one.context is None else {"num_ctx": one.context}
        async with engine.lease_slot(one.model, options, None) as lease:
            await engine.prefill(lease, one.prompt)
            pacer = engine.start_decoding(lease, one.tokens)
            while pacer.sent < one.tokens:
                await pacer.wait_due()
            ends[number] = engine.clock()

    async def main(clock: Callable[[], float]) -> None:
        engine = Engine(host, clock=clock)
        await asyncio.gather(*(send(engine, number, one) for number, one in enumerate(sent)))

    run_in_virtual_time(main)
    return ends


def run_simulator(host: HostProfile, sent: Sequence[Sent]) -> list[float]:
    assert host.tokens_per_s is not None
    assert host.prefill_tokens_per_s is not None
    models = {
        model.name: ModelSpec(
            model.name, host.tokens_per_s, host.prefill_tokens_per_s, host.load_s, model.vram_mib, host.slots
        )
        for model in host.models
    }
    spec = NodeSpec(
        host.name,
        models,
        loaded=(A.name,),
        share=host.share,
        prefill_stall=float(host.prefill_stalls),
        prefill_lanes=1 if host.prefill_stalls else host.slots,
        lost_tokens=host.lost_tokens,
        max_loaded=host.max_loaded or 3,
        context=host.context,
        keep_alive_s=host.keep_alive_s,
    )
    driver = ServerDriver(spec)
    for number, one in enumerate(sent):
        driver.send(
            number,
            one.at_s,
            prompt=len(one.blocks) * BLOCK_TOKENS,
            tokens=one.tokens,
            model=one.model.name,
            blocks=one.block_ids,
            block_tokens=BLOCK_TOKENS,
            context=one.context,
        )
    ends = driver.finish()
    return [ends[number] for number in range(len(sent))]


def draw(
    rng: Random,
    *,
    rate: float,
    models: Sequence[ModelProfile] = (A,),
    shared: int = 0,
    contexts: Sequence[int | None] = (None,),
) -> list[Sent]:
    """100 requests at random times. With ``shared``, so many different texts of ten blocks begin them."""
    sent = []
    at_s = 0.0
    for number in range(100):
        at_s += rng.expovariate(rate)
        head = [rng.randrange(shared)] * 10 if shared else []
        blocks = (*head, *(20 * (number + 1) + block for block in range(rng.randint(1, 15))))
        sent.append(Sent(at_s, rng.choice(models), blocks, rng.randint(1, 150), rng.choice(contexts)))
    return sent


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stalls", [True, False])
def test_each_request_ends_at_the_same_time(seed: int, stalls: bool) -> None:
    host = replace(HOST, prefill_stalls=stalls)
    sent = draw(Random(seed), rate=1.5)
    assert run_simulator(host, sent) == pytest.approx(run_lab(host, sent), abs=ROUNDING_S)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shared", [2, 8])
@pytest.mark.parametrize("lost_tokens", [0, 5000, 65_000])
def test_the_same_parts_of_prompts_are_read(seed: int, shared: int, lost_tokens: int) -> None:
    host = replace(HOST, lost_tokens=lost_tokens)
    sent = draw(Random(seed), rate=1.5, shared=shared)
    assert run_simulator(host, sent) == pytest.approx(run_lab(host, sent), abs=ROUNDING_S)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("max_loaded", [1, 2])
def test_loads_take_the_same_time(seed: int, max_loaded: int) -> None:
    host = replace(HOST, max_loaded=max_loaded)
    sent = draw(Random(seed), rate=0.5, models=(A, B), contexts=(None, None, 8192))
    assert run_simulator(host, sent) == pytest.approx(run_lab(host, sent), abs=ROUNDING_S)
