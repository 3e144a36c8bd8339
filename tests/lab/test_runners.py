"""The rules of Ollama's server/sched.go, in virtual time."""

import asyncio
import math
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from gpumesh.lab.inference.engine import Engine
from gpumesh.lab.profile import EMBEDDER, LLAMA_8B, QWEN_7B, ModelProfile, make_gpu, make_host
from tests.lab.virtual_time import run_in_virtual_time

LOAD_S = 4.0
A, B, C = (replace(model, speed=1.0) for model in (QWEN_7B, LLAMA_8B, replace(QWEN_7B, name="c:7b")))
ONE_MODEL = make_host("one", models=(A, B, C), load_s=LOAD_S, slots=2, max_loaded=1)
TWO_MODELS = replace(ONE_MODEL, max_loaded=2)


class Uses:
    """Uses of an engine's models at given times. ``times`` has, for each name of a use, when its slot came."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.times: dict[str, float] = {}
        self.load_s: dict[str, float] = {}

    async def use(
        self,
        name: str,
        model: ModelProfile,
        at_s: float,
        for_s: float = 1.0,
        *,
        keep_alive: object = None,
        **options: int,
    ) -> None:
        await asyncio.sleep(at_s)
        async with self.engine.lease_slot(model, dict(options), keep_alive) as lease:
            self.times[name] = self.engine.clock()
            self.load_s[name] = lease.load_s
            await asyncio.sleep(for_s)


def run(profile: Any, make: Callable[[Uses], list[Coroutine[Any, Any, None]]]) -> Uses:
    """Runs all uses that ``make`` makes at the same time."""

    async def main(clock: Callable[[], float]) -> Uses:
        uses = Uses(Engine(profile, clock=clock))
        await asyncio.gather(*make(uses))
        return uses

    return run_in_virtual_time(main)


def in_memory(uses: Uses) -> set[str]:
    return {runner.model.name for runner in uses.engine.list_runners()}


def test_a_loaded_model_serves_while_another_loads() -> None:
    uses = run(TWO_MODELS, lambda u: [u.use("a", A, 0.0), u.use("b", B, 5.0), u.use("again", A, 6.0)])
    assert uses.times == {"a": 4.0, "b": 9.0, "again": 6.0}


def test_requests_for_a_model_that_loads_wait_for_the_one_load() -> None:
    uses = run(ONE_MODEL, lambda u: [u.use("first", A, 0.0), u.use("second", A, 3.0)])
    assert uses.times == {"first": 4.0, "second": 4.0}
    assert uses.load_s == {"first": 4.0, "second": 1.0}
    assert uses.engine.loads == 1


def test_loads_come_one_at_a_time() -> None:
    uses = run(TWO_MODELS, lambda u: [u.use("a", A, 0.0, 9.0), u.use("b", B, 1.0)])
    assert uses.times == {"a": 4.0, "b": 8.0}


def test_what_is_pushed_out_is_drained_first_and_new_requests_for_it_still_run() -> None:
    uses = run(
        ONE_MODEL,
        lambda u: [u.use("a", A, 0.0, 3.0), u.use("b", B, 5.0), u.use("joins", A, 6.0, 3.0), u.use("waits", C, 5.5)],
    )
    # ``a`` runs until 7 and ``joins`` until 9. Only then b is loaded, until 13, and used until 14; then c.
    assert uses.times == {"a": 4.0, "joins": 6.0, "b": 13.0, "waits": 18.0}
    assert uses.load_s["b"] == 8.0  # the drain and the load
    assert in_memory(uses) == {C.name}


def test_a_pending_request_waits_for_those_before_it_even_if_its_model_is_loaded_meanwhile() -> None:
    uses = run(
        ONE_MODEL,
        lambda u: [u.use("a", A, 0.0), u.use("b", B, 0.1), u.use("b2", B, 0.2), u.use("a2", A, 0.3)],
    )
    # a2 comes while a loads, so it runs when a does. b2 comes as the second of the pending, and finds b loaded.
    assert uses.times == {"a": 4.0, "a2": 4.0, "b": 9.0, "b2": 9.0}
    assert uses.engine.loads == 2


def test_other_options_reload_the_model_after_its_users() -> None:
    uses = run(ONE_MODEL, lambda u: [u.use("a", A, 0.0, 3.0), u.use("other", A, 5.0, num_ctx=8192)])
    assert uses.times == {"a": 4.0, "other": 11.0}


@pytest.mark.parametrize(("num_ctx", "loads"), [(2, 2), (4, 2), (32768, 1), (65536, 1)])
def test_a_context_is_bounded_by_what_the_model_was_trained_with(num_ctx: int, loads: int) -> None:
    uses = run(ONE_MODEL, lambda u: [u.use("a", A, 0.0), u.use("other", A, 6.0, num_ctx=num_ctx)])
    assert uses.engine.loads == loads


def test_the_default_context_is_the_profiles() -> None:
    uses = run(replace(ONE_MODEL, context=4096), lambda u: [u.use("a", A, 0.0), u.use("same", A, 6.0, num_ctx=4096)])
    assert uses.engine.loads == 1
    assert uses.engine.list_runners()[0].context_length == 4096


def test_the_unused_model_goes_first_then_that_with_the_shortest_keep_alive() -> None:
    def busy_and_idle(uses: Uses) -> list[Coroutine[Any, Any, None]]:
        return [
            uses.use("busy", A, 0.0, 20.0, keep_alive=10),
            uses.use("idle", B, 0.0, keep_alive=-1),
            uses.use("new", C, 12.0),
        ]

    uses = run(TWO_MODELS, busy_and_idle)
    assert uses.times["new"] == 16.0
    assert in_memory(uses) == {A.name, C.name}

    def all_idle(uses: Uses) -> list[Coroutine[Any, Any, None]]:
        return [uses.use("a", A, 0.0, keep_alive="1h"), uses.use("b", B, 0.0, keep_alive="2h"), uses.use("c", C, 12.0)]

    assert in_memory(run(TWO_MODELS, all_idle)) == {B.name, C.name}

    def all_busy(uses: Uses) -> list[Coroutine[Any, Any, None]]:
        return [
            uses.use("a", A, 0.0, 20.0, keep_alive="2h"),
            uses.use("b", B, 0.0, 20.0, keep_alive="1h"),
            uses.use("c", C, 12.0),
        ]

    assert run(TWO_MODELS, all_busy).times["c"] == 32.0  # b ends at 28, although a ends at 24


def test_without_a_number_three_models_for_each_gpu_if_they_fit() -> None:
    embedders = tuple(replace(EMBEDDER, name=f"e{number}") for number in range(4))
    profile = make_host("many", models=embedders, load_s=0.0)
    uses = run(profile, lambda u: [u.use(model.name, model, number) for number, model in enumerate(embedders)])
    assert len(in_memory(uses)) == 3
    too_small = replace(profile, models=(A, B), gpus=(make_gpu("many", memory_mib=12000),))
    # 12,000 MiB would hold both, but the second needs more than 80 % of what the first leaves.
    assert len(in_memory(run(too_small, lambda u: [u.use("a", A, 0.0), u.use("b", B, 2.0)]))) == 1


def test_a_request_without_keep_alive_leaves_it_as_it_is() -> None:
    uses = run(ONE_MODEL, lambda u: [u.use("a", A, 0.0, keep_alive=-1), u.use("again", A, 6.0)])
    assert math.isinf(uses.engine.list_runners()[0].expires_at)


def test_a_keep_alive_in_a_drain_makes_the_load_wait_until_it_has_passed() -> None:
    uses = run(
        ONE_MODEL,
        lambda u: [u.use("a", A, 0.0, 3.0), u.use("b", B, 5.0), u.use("joins", A, 6.0, 2.0, keep_alive=10)],
    )
    assert uses.times["b"] == 8.0 + 10.0 + LOAD_S


def test_a_request_that_is_given_up_in_a_drain_still_has_the_model_unloaded() -> None:
    async def main(clock: Callable[[], float]) -> Uses:
        uses = Uses(Engine(ONE_MODEL, clock=clock))
        running = asyncio.create_task(uses.use("a", A, 0.0, 3.0))
        await asyncio.sleep(5.0)
        given_up = asyncio.create_task(uses.use("b", B, 0.0))
        await asyncio.sleep(1.0)
        given_up.cancel()
        await asyncio.gather(given_up, running, return_exceptions=True)
        return uses

    uses = run_in_virtual_time(main)
    assert in_memory(uses) == set()
    assert uses.times == {"a": 4.0}


def test_a_load_that_is_given_up_is_begun_anew_by_the_next() -> None:
    async def main(clock: Callable[[], float]) -> Uses:
        uses = Uses(Engine(ONE_MODEL, clock=clock))
        first = asyncio.create_task(uses.use("first", A, 0.0))
        second = asyncio.create_task(uses.use("second", A, 1.0))
        await asyncio.sleep(2.0)
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        return uses

    uses = run_in_virtual_time(main)
    assert uses.times == {"second": 2.0 + LOAD_S}
    assert uses.engine.loads == 1


def test_an_embedder_has_one_slot() -> None:
    profile = make_host("embeds", models=(EMBEDDER,), load_s=0.0, slots=4)
    uses = run(profile, lambda u: [u.use("first", EMBEDDER, 0.0), u.use("second", EMBEDDER, 0.0)])
    assert uses.times == {"first": 0.0, "second": 1.0}
