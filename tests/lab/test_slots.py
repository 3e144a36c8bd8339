import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.lab.inference.prefixes import LostTexts, common_prefix_length
from gpumesh.lab.inference.slots import Slot, SlotPool

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


async def test_a_text_that_its_slot_has_lost_comes_back() -> None:
    pool = SlotPool(1, lost_tokens=100)
    await work(pool, "one two three four")
    await work(pool, "another text")
    await pool.acquire()
    slot, cached = pool.take_slot("one two three four five")
    assert cached == len("one two three four")
    assert slot.text == "one two three four"


async def test_without_a_cache_in_memory_what_is_lost_is_lost() -> None:
    pool = SlotPool(1)
    await work(pool, "one two three four")
    await work(pool, "another text")
    await pool.acquire()
    assert pool.take_slot("one two three four five")[1] == 0


def test_lost_texts_are_kept_up_to_their_limit_the_latest_longest() -> None:
    lost = LostTexts(4)
    for text in ("a b", "a b c", "d e"):  # the second has the first in it; with the third they are five tokens
        lost.save(text)
    assert lost.take_better("", "a b c d") == ""
    assert lost.take_better("", "d e f") == "d e"
    assert lost.take_better("", "d e f") == ""  # it is in the slot now


def test_a_lost_text_must_be_better_than_the_slots_own_and_mostly_used() -> None:
    lost = LostTexts(100)
    lost.save("abcdefgh" * 4)
    assert lost.take_better("", "abcdef") == ""  # less than a quarter of it
    assert lost.take_better("abcdefgh", "abcdefgh" * 2) == "abcdefgh"  # all of the slot's own text is used
    assert lost.take_better("axx", "abcdefgh" * 2) == "abcdefgh" * 4
