"""A simulated server behaves as Ollama does: loads, evictions, what waits for what, and the counters."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gpumesh.balancer.outcomes import Outcome
from gpumesh.bench.simulate.fleet import Fault, FaultKind
from gpumesh.bench.simulate.servers.blocks import common_blocks
from gpumesh.bench.simulate.servers.prefix_cache import PrefixCache
from gpumesh.bench.simulate.servers.runner import Runner
from tests.bench.simulate.build import MODEL, OTHER, node, request
from tests.bench.simulate.server_driver import ServerDriver

THIRD = replace(MODEL, name="third:latest")


def test_past_the_slots_a_request_waits_inside_and_only_the_total_shows_it() -> None:
    driver = ServerDriver(node())
    for number in range(3):
        driver.send(number, 0.0)
    assert driver.finish() == pytest.approx({0: 1.1, 1: 1.1, 2: 2.2})
    counters = driver.counters[2]
    assert counters is not None
    assert counters.waited_ms == pytest.approx(1100.0)
    assert counters.load_ms == pytest.approx(0.0)
    assert counters.prompt_ms == pytest.approx(100.0)
    assert counters.tokens_per_s == pytest.approx(100.0)


def test_the_load_duration_covers_the_wait_for_the_runner() -> None:
    driver = ServerDriver(node(models=(MODEL, OTHER), max_loaded=1))
    driver.send(0, 0.0)
    driver.send(1, 0.5, model=OTHER.name)
    driver.finish()
    counters = driver.counters[1]
    assert counters is not None
    assert counters.load_ms == pytest.approx((1.1 - 0.5 + 4.0) * 1000.0)  # the drain, then the load
    assert counters.waited_ms == pytest.approx(0.0)


def test_one_load_at_a_time_in_the_order_of_arrival() -> None:
    driver = ServerDriver(node(models=(MODEL, OTHER, THIRD), loaded=()))
    driver.send(0, 0.0, model=OTHER.name)
    driver.send(1, 0.0, model=THIRD.name)
    driver.send(2, 1.0, model=OTHER.name)  # waits for the load that runs
    assert driver.finish() == pytest.approx({0: 5.1, 2: 5.1, 1: 9.1})
    assert driver.server.loads == 2


def test_an_idle_model_is_pushed_out_before_a_busy_one() -> None:
    driver = ServerDriver(node(models=(MODEL, OTHER, THIRD), loaded=(MODEL.name, OTHER.name), max_loaded=2))
    driver.send(0, 0.0)  # MODEL is busy, and first by name
    driver.send(1, 0.0, model=THIRD.name)
    assert set(driver.server.loaded_models(0.0)) == {MODEL.name, THIRD.name}
    assert driver.finish() == pytest.approx({0: 1.1, 1: 5.1})


def test_memory_decides_what_fits() -> None:
    driver = ServerDriver(node(models=(MODEL, OTHER, THIRD), vram_mib=11_300.0))
    driver.send(0, 0.0, model=OTHER.name)
    driver.finish()
    assert driver.server.loaded_models(6.0) == {MODEL.name: (5000, 4096), OTHER.name: (5000, 4096)}
    driver.send(1, 6.0, model=THIRD.name)
    assert len(driver.server.loaded_models(6.0)) == 2


def test_a_model_that_is_used_all_the_time_delays_what_would_push_it_out() -> None:
    driver = ServerDriver(node(models=(MODEL, OTHER), max_loaded=1))
    driver.send(0, 0.0)
    driver.send(1, 0.5, model=OTHER.name)
    for number in range(2, 6):
        driver.send(number, number - 1.0)  # at each second, while the one before runs
    ends = driver.finish()
    assert ends[5] == pytest.approx(5.1)
    assert ends[1] == pytest.approx(5.1 + 4.0 + 1.1)


def test_what_was_not_used_for_long_is_unloaded() -> None:
    driver = ServerDriver(node(keep_alive_s=60.0))
    driver.send(0, 0.0)
    driver.send(1, 50.0)
    driver.finish()
    assert driver.server.loads == 0
    assert not driver.server.loaded_models(200.0)
    driver.send(2, 200.0)
    assert driver.finish()[2] == pytest.approx(205.1)


def test_too_many_that_wait_for_loads_are_refused() -> None:
    driver = ServerDriver(node(models=(MODEL, OTHER), max_loaded=1, max_pending=1))
    driver.send(0, 0.0)
    driver.send(1, 0.0, model=OTHER.name)
    driver.send(2, 0.0, model=OTHER.name)
    assert driver.ends[2] == (0.0, Outcome.SERVER_ERROR)


def test_what_the_server_does_not_have_is_not_found() -> None:
    driver = ServerDriver(node())
    driver.send(0, 0.0, model="nothing:latest")
    assert driver.ends[0] == (0.0, Outcome.MODEL_NOT_FOUND)


def test_a_liar_has_true_times_and_false_counters() -> None:
    driver = ServerDriver(node())
    driver.server.change_fault(Fault(FaultKind.LYING, 0.0, 10.0, factor=0.1), 0.0, starts=True)
    driver.send(0, 0.0)
    assert driver.finish()[0] == pytest.approx(1.1)
    counters = driver.counters[0]
    assert counters is not None
    assert counters.tokens_per_s == pytest.approx(1000.0)


def test_counts_that_lie_are_in_the_counters_only() -> None:
    driver = ServerDriver(node())
    for number, fault in enumerate(
        (
            Fault(FaultKind.MISCOUNTING, 0.0, 10.0, factor=10.0),
            Fault(FaultKind.MISCOUNTING, 0.0, 10.0, factor=0.0),
            Fault(FaultKind.NO_COUNTS, 0.0, 10.0),
        )
    ):
        driver.server.change_fault(fault, 0.0, starts=True)
        driver.send(number, 10.0 * number)
        driver.finish()
        driver.server.change_fault(fault, 0.0, starts=False)
    counts = [
        (counters.prompt_tokens, counters.tokens) for counters in driver.counters.values() if counters is not None
    ]
    assert counts == [(1000, 1000), (0, 0), (None, None)]
    assert [at for at, _ in driver.ends.values()] == pytest.approx([1.1, 11.1, 21.1])


def test_random_counts_stay_within_the_factor() -> None:
    driver = ServerDriver(node())
    driver.server.change_fault(Fault(FaultKind.RANDOM_COUNTS, 0.0, math.inf, factor=10.0), 0.0, starts=True)
    for number in range(20):
        driver.send(number, 10.0 * number)
    driver.finish()
    tokens = [counters.tokens or 0 for counters in driver.counters.values() if counters is not None]
    assert len(set(tokens)) > 10
    assert all(10 <= count <= 1000 for count in tokens)


def test_a_list_that_lies_shows_in_the_list_and_in_a_404() -> None:
    lists_missing, hides = (
        Fault(FaultKind.LISTS_MISSING, 0.0, math.inf, model="nothing:latest"),
        Fault(FaultKind.HIDES, 5.0, 6.0, model=MODEL.name),
    )
    driver = ServerDriver(node(faults=(lists_missing, hides)))
    lies = driver.server.lies
    assert lies.listed == {MODEL.name, "nothing:latest"}, "from the start"
    driver.send(0, 0.0, model="nothing:latest")
    assert driver.ends[0] == (0.0, Outcome.MODEL_NOT_FOUND)
    driver.server.change_fault(hides, 5.0, starts=True)
    assert lies.listed == {"nothing:latest"}
    driver.send(1, 5.0)
    assert driver.finish()[1] == pytest.approx(6.1), "it has the model nevertheless"
    driver.server.change_fault(hides, 6.0, starts=False)
    driver.server.change_fault(lists_missing, 6.0, starts=False)
    assert lies.listed == {MODEL.name}


def test_a_lost_connection_ends_all_and_frees_the_slots() -> None:
    driver = ServerDriver(node(models=(MODEL, OTHER), max_loaded=1))
    for number in range(3):
        driver.send(number, 0.0)
    driver.send(3, 0.0, model=OTHER.name)
    driver.advance_to(0.6)
    driver.server.change_fault(Fault(FaultKind.AWAY, 0.6, 1.0), 0.6, starts=True)
    driver._collect(0.6)
    outcomes = {number: outcome for number, (_, outcome) in driver.ends.items()}
    assert outcomes == {0: Outcome.CUT, 1: Outcome.CUT, 2: Outcome.UNREACHABLE, 3: Outcome.UNREACHABLE}
    driver.server.change_fault(Fault(FaultKind.AWAY, 0.6, 1.0), 1.0, starts=False)
    driver.send(4, 2.0, model=OTHER.name)
    assert driver.finish()[4] == pytest.approx(2.0 + 4.0 + 1.1)


# -- caches of prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "count"), [((), (1,), 0), ((1, 2), (1, 2, 3), 2), ((1, 2, 3), (1, 9, 8), 1), ((5,), (6,), 0)]
)
def test_common_blocks(one: tuple[int, ...], other: tuple[int, ...], count: int) -> None:
    assert common_blocks(one, other) == count
    assert common_blocks(other, one) == count


def test_the_slot_with_the_same_beginning_is_taken_else_the_oldest() -> None:
    runner = Runner(MODEL, 4096, node(), 0.0)
    first, _ = runner.take_slot(request(0, prompt=300, blocks=(1, 2, 3), block_tokens=100))
    second, _ = runner.take_slot(request(1, prompt=300, blocks=(7, 8, 9), block_tokens=100))
    runner.free_slots += [second, first]
    slot, cached = runner.take_slot(request(2, prompt=400, blocks=(1, 2, 3, 4), block_tokens=100))
    assert (slot, cached) == (first, 300)
    runner.free_slots.append(slot)
    slot, cached = runner.take_slot(request(3, prompt=100, blocks=(100,), block_tokens=100))
    assert (slot, cached) == (second, 0)


def test_the_shared_cache_keeps_what_slots_have_lost() -> None:
    runner = Runner(replace(MODEL, slots=1), 4096, node(cache_tokens=600), 0.0)
    for blocks, expected in (((1, 2, 3), 0), ((7, 8, 9), 0), ((1, 2, 3, 4), 300)):
        slot, cached = runner.take_slot(request(0, prompt=100 * len(blocks), blocks=blocks, block_tokens=100))
        assert cached == expected
        runner.free_slots.append(slot)


def test_of_slots_that_share_equally_much_the_first_is_taken() -> None:
    runner = Runner(MODEL, 4096, node(), 0.0)
    first, _ = runner.take_slot(request(0, prompt=300, blocks=(1, 2, 3), block_tokens=100))
    second, _ = runner.take_slot(request(1, prompt=300, blocks=(1, 2, 4), block_tokens=100))
    runner.free_slots += [second, first]
    assert runner.take_slot(request(2, prompt=300, blocks=(1, 2, 5), block_tokens=100)) == (first, 200)


def test_what_a_slot_loses_comes_back() -> None:
    runner = Runner(replace(MODEL, slots=1), 4096, node(lost_tokens=3000), 0.0)

    def cached(*blocks: int) -> int:
        """Takes the slot for a prompt, and frees it. Returns the tokens that the server had of it."""
        slot, tokens = runner.take_slot(request(0, prompt=100 * len(blocks), blocks=blocks, block_tokens=100))
        runner.free_slots.append(slot)
        return tokens

    long = tuple(range(20, 40))
    assert [cached(1, 2, 3), cached(7, 8, 9), cached(1, 2, 3, 4), cached(7)] == [0, 0, 300, 100]
    assert [cached(*long), cached(50), cached(20, 21, 60), cached(51)] == [0, 0, 0, 0], "it has a tenth of what is kept"
    assert cached(*long[:5], 60) == 500
    assert cached(1, 2, 3) == 300
    assert [cached(*range(100, 130)), cached(70), cached(1, 2, 3)] == [0, 0, 0], "the oldest are forgotten"


def test_a_misfit_of_a_load_is_pending_only_when_the_load_has_ended() -> None:
    driver = ServerDriver(node(models=(MODEL, OTHER), loaded=(), max_loaded=1))
    driver.send(0, 0.0)
    driver.send(1, 1.0, context=8192)  # Ollama compares the options only when the model is loaded
    driver.send(2, 2.0, model=OTHER.name)
    assert driver.finish() == pytest.approx({0: 5.1, 2: 5.1 + 5.1, 1: 5.1 + 2 * 5.1})


def test_the_last_blocks_of_the_oldest_prompt_go_first() -> None:
    cache = PrefixCache(5)
    cache.add((1, 2, 3))
    cache.add((7, 8, 9))
    assert cache.count((1, 2, 3)) == 2
    assert cache.count((7, 8, 9, 10)) == 3
