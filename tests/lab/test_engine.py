import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from gpumesh.lab import profile
from gpumesh.lab.inference.engine import Engine, record_output
from gpumesh.lab.inference.keep_alive import parse_keep_alive
from gpumesh.lab.inference.pacing import DecodeClock, Pacer
from gpumesh.lab.inference.usage import UsageAverage
from gpumesh.lab.profile import QWEN_7B, QWEN_14B
from tests.lab.virtual_time import run_in_virtual_time

FAST = profile.make_host("fast", models=(QWEN_7B, QWEN_14B), load_s=0.0, prefill_tokens_per_s=None, slots=2)


async def hold(engine: Engine, entered: asyncio.Event, leave: asyncio.Event, model: str = "qwen2.5:7b") -> None:
    found = engine.find_model(model)
    assert found is not None
    async with engine.lease_slot(found, {}, None):
        entered.set()
        await leave.wait()


async def test_requests_past_the_slots_wait_and_are_served_in_turn() -> None:
    engine = Engine(FAST)
    leave = asyncio.Event()
    entered = [asyncio.Event() for _ in range(3)]
    async with asyncio.TaskGroup() as group:
        for event in entered:
            group.create_task(hold(engine, event, leave))
        await entered[1].wait()
        assert not entered[2].is_set()
        assert engine.running == 2
        leave.set()
    assert (engine.running, engine.max_running, engine.loads) == (0, 2, 1)


async def test_other_options_make_a_reload_and_the_default_context_does_not() -> None:
    engine = Engine(FAST)
    asked: list[dict[str, object]] = [
        {},
        {"num_ctx": 32768},
        {"temperature": 0.3},
        {"num_ctx": 8192},
        {"num_ctx": 8192},
    ]
    for options in asked:
        async with engine.lease_slot(QWEN_7B, options, None):
            pass
    assert engine.loads == 2
    assert engine.list_runners()[0].context_length == 8192


async def test_a_model_leaves_memory_when_its_time_is_over() -> None:
    now = 0.0
    engine = Engine(FAST, clock=lambda: now)
    async with engine.lease_slot(QWEN_7B, {}, 10):
        pass
    now = 9.0
    assert len(engine.list_runners()) == 1
    now = 10.0
    assert engine.list_runners() == []
    assert engine.gpu_load().models == ()


async def test_models_that_do_not_fit_together_take_turns() -> None:
    small = profile.make_host("small", models=(QWEN_7B, QWEN_14B), load_s=0.0)
    engine = Engine(replace(small, gpus=(profile.make_gpu("small", memory_mib=12000),)))
    for model in (QWEN_7B, QWEN_14B, QWEN_7B):
        async with engine.lease_slot(model, {}, -1):
            assert [runner.model.name for runner in engine.list_runners()] == [model.name]
    assert engine.loads == 3


async def test_a_load_that_is_cancelled_leaves_nothing() -> None:
    engine = Engine(profile.make_host("slow", load_s=3600.0))
    task = asyncio.create_task(hold(engine, asyncio.Event(), asyncio.Event()))
    while not engine.list_runners():
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert engine.list_runners() == []


async def test_a_prompt_seen_before_costs_only_what_is_new() -> None:
    engine = Engine(profile.make_host("cache", load_s=0.0, prefill_tokens_per_s=1e6))
    prompt = "word " * 1000
    async with engine.lease_slot(QWEN_7B, {}, None) as lease:
        tokens, first_s = await engine.prefill(lease, prompt)
        _, second_s = await engine.prefill(lease, prompt + "and more")
    assert tokens == 1000
    assert second_s < first_s / 100


async def answer(engine: Engine, prompt: str, output: str = "") -> tuple[int, float]:
    """Answers with ``output``. Returns the tokens that were read, and the seconds that it took."""
    async with engine.lease_slot(QWEN_7B, {}, None) as lease:
        _tokens, seconds = await engine.prefill(lease, prompt)
        record_output(lease, output)
        return lease.read_tokens, seconds


async def test_the_answer_is_in_the_cache_too() -> None:
    engine = Engine(profile.make_host("cache", load_s=0.0, prefill_tokens_per_s=None))
    assert await answer(engine, "one two three ", "four five ") == (3, 0.0)
    assert await answer(engine, "one two three four five six") == (1, 0.0)
    assert await answer(engine, "one two other") == (1, 0.0)  # the cache was lost from the third word on
    assert await answer(engine, "one two three four five six") == (4, 0.0)


def test_a_prompt_that_stalls_the_streams_makes_their_tokens_late_and_other_prompts_wait() -> None:
    host = profile.make_host("stalls", load_s=0.0, slots=3, tokens_per_s=1.0, prefill_tokens_per_s=1.0)

    async def main(clock: Callable[[], float]) -> tuple[list[float], tuple[int, float], tuple[int, float]]:
        engine = Engine(replace(host, prefill_stalls=True), clock=clock)

        async def stream() -> list[float]:
            async with engine.lease_slot(QWEN_7B, {}, None) as lease:
                pacer = engine.start_decoding(lease, 3)
                times = []
                while pacer.sent < 3:
                    await pacer.wait_due()
                    times.append(clock())
                return times

        async def later(delay_s: float, prompt: str) -> tuple[int, float]:
            await asyncio.sleep(delay_s)
            return await answer(engine, prompt)

        return await asyncio.gather(stream(), later(1.5, "one two"), later(2.5, "three four five"))

    times, first, second = run_in_virtual_time(main)
    assert times == pytest.approx([1.0, 7.0, 8.0])  # no token from 1.5 to 3.5, and none until 6.5
    assert first == (2, 2.0)
    assert second == (3, 4.0)


def test_a_prompt_that_stalls_nothing_is_read_beside_the_streams() -> None:
    host = profile.make_host("free", load_s=0.0, slots=2, prefill_tokens_per_s=1.0)

    async def main(clock: Callable[[], float]) -> float:
        engine = Engine(host, clock=clock)
        await asyncio.gather(answer(engine, "one two"), answer(engine, "three four five"))
        return clock()

    assert run_in_virtual_time(main) == 3.0


def test_the_meter_forgets() -> None:
    now = 0.0
    meter = UsageAverage(1.0, lambda: now)
    meter.set_target(1.0)
    now = 10.0
    assert meter.update() == pytest.approx(1.0, abs=1e-3)
    meter.set_target(0.0)
    now = 11.0
    assert meter.update() == pytest.approx(math.exp(-1.0), abs=1e-3)


async def test_a_pacer_that_is_late_catches_up_and_never_passes_its_total() -> None:
    now = 0.0
    pacer = Pacer(5, 100.0, DecodeClock(clock=lambda: now))
    now = 0.035
    assert await pacer.wait_due() == 3
    now = 1.0
    assert await pacer.wait_due() == 5


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [(None, 300.0), (10, 10.0), ("5m", 300.0), ("1h30m", 5400.0), (-1, math.inf), ("-1s", math.inf), ("0", 0.0)],
)
def test_keep_alive(keep_alive: object, seconds: float) -> None:
    assert parse_keep_alive(keep_alive, 300.0) == seconds


def test_a_keep_alive_that_is_no_duration_is_refused() -> None:
    with pytest.raises(ValueError, match="invalid duration"):
        parse_keep_alive("soon", 300.0)
