import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.lab.inference.slots import Slot, SlotPool, common_prefix_length

SYSTEM = "You are a helpful assistant. "


async def work(pool: SlotPool, *prompts: str) -> list[Slot]:
    """Works on all prompts at the same time. Returns the slot of each."""
    slots = []
    for prompt in prompts:
        await pool.acquire()
        slot, _cached = pool.take_slot(prompt)
        slot.text = prompt
        slots.append(slot)
    for slot in slots:
        pool.release(slot)
    return slots


async def test_a_prompt_goes_to_the_slot_that_has_most_of_it() -> None:
    pool = SlotPool(3)
    first, second, _ = await work(pool, SYSTEM + "One.", SYSTEM + "Two.", "Other words.")
    assert await work(pool, SYSTEM + "Two. And now?") == [second]
    assert await work(pool, SYSTEM + "One. And now?") == [first]


async def test_a_prompt_that_no_slot_knows_goes_to_the_oldest_one() -> None:
    pool = SlotPool(2)
    first, second = await work(pool, "a" * 100, "b" * 100)
    assert await work(pool, "a" * 100 + "!") == [first]
    assert await work(pool, "a" * 10 + "c" * 91) == [second]  # 10 of 101 characters are less than a tenth
    assert await work(pool, "b" * 100) == [first]  # the second slot knows the other text now


async def test_a_busy_slot_is_not_taken_however_well_it_fits() -> None:
    pool = SlotPool(2)
    await pool.acquire()
    busy, _ = pool.take_slot(SYSTEM)
    busy.text = SYSTEM
    await pool.acquire()
    slot, cached = pool.take_slot(SYSTEM)
    assert slot is not busy
    assert cached == 0


async def test_a_shared_cache_helps_all_slots() -> None:
    pool = SlotPool(2, shared_cache=True)
    await pool.acquire()
    busy, _ = pool.take_slot(SYSTEM)
    busy.text = SYSTEM
    await pool.acquire()
    assert pool.take_slot(SYSTEM)[1] == len(SYSTEM)


async def test_requests_past_the_slots_wait_in_turn() -> None:
    pool = SlotPool(1)
    await pool.acquire()
    waiting = [asyncio.create_task(pool.acquire()) for _ in range(2)]
    await asyncio.sleep(0)
    assert not waiting[0].done()
    pool.release(None)
    await waiting[0]
    assert not waiting[1].done()
    pool.release(None)
    await waiting[1]


@given(st.text("ab", max_size=20), st.text("ab", max_size=20))
def test_the_common_prefix_is_the_longest_one(first: str, second: str) -> None:
    length = common_prefix_length(first, second)
    assert first[:length] == second[:length]
    assert first[length : length + 1] != second[length : length + 1] or length == len(first) == len(second)


@pytest.mark.parametrize("count", [1, 4])
async def test_all_slots_can_be_taken_at_once(count: int) -> None:
    assert len({id(slot) for slot in await work(SlotPool(count), *(str(n) for n in range(count)))}) == count
