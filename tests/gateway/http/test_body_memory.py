"""The accounting of the memory that the bodies of all requests may take together."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from gpumesh.gateway.http.bodies.body_memory import SMALL_BODY_BYTES, BodyMemory, MemoryReservation

MIB = 1 << 20

ACTIONS = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.sampled_from(
            ["reserve", "try to reserve", "give back", "start reading", "finish reading", "release", "wait"]
        ),
    ).flatmap(lambda action: st.tuples(st.just(action), st.integers(0, 6 * MIB))),
    max_size=60,
)


@given(ACTIONS)
@example([((0, "release"), 0), ((0, "try to reserve"), 0)])
def test_memory_held_is_the_sum_of_the_reservations(actions: list[tuple[tuple[int, str], int]]) -> None:
    now = 0.0
    memory = BodyMemory(16 * MIB, patience_s=30.0, clock=lambda: now)
    reservations = [MemoryReservation(memory) for _ in range(6)]
    for (which, what), size in actions:
        reservation = reservations[which]
        match what:
            case "reserve":
                before = reservation.size
                assert reservation.reserve(size) == (
                    reservation.size == before + size and not reservation.refused and not reservation.released
                )
            case "try to reserve":
                before = reservation.size
                assert reservation.try_reserve(size) == (
                    reservation.size != before or (size == 0 and not reservation.refused and not reservation.released)
                )
            case "give back":
                reservation.release_bytes(size)
            case "start reading":
                reservation.start_reading(lambda: None)
            case "finish reading":
                reservation.finish_reading()
            case "release":
                reservation.release()
            case "wait":
                now += 20.0
        assert memory.held == sum(item.size for item in reservations) <= memory.total
        assert all(item.size == 0 for item in reservations if item.refused or item.released)
    for reservation in reservations:
        reservation.release()
        reservation.release()
    assert memory.held == 0
    assert not memory.reading_since


def test_the_last_eighth_is_for_small_bodies() -> None:
    memory = BodyMemory(16 * MIB, patience_s=30.0, clock=lambda: 0.0)
    large, small = MemoryReservation(memory), MemoryReservation(memory)
    assert large.reserve(14 * MIB)
    assert memory.max_body_bytes == 14 * MIB
    assert not MemoryReservation(memory).reserve(SMALL_BODY_BYTES + 1)
    assert small.reserve(SMALL_BODY_BYTES)
    assert MemoryReservation(memory).reserve(SMALL_BODY_BYTES)
    assert not MemoryReservation(memory).reserve(1)
    assert not small.reserve(1)
    assert memory.held == 15 * MIB, "the bodies that found no room hold nothing"


def test_a_body_that_arrives_for_too_long_makes_room() -> None:
    now = 0.0
    memory = BodyMemory(16 * MIB, patience_s=30.0, clock=lambda: now)
    lost: list[str] = []
    old, young, whole = MemoryReservation(memory), MemoryReservation(memory), MemoryReservation(memory)
    assert whole.reserve(4 * MIB)
    old.start_reading(lambda: lost.append("old"))
    assert old.reserve(5 * MIB)
    now = 20.0
    young.start_reading(lambda: lost.append("young"))
    assert young.reserve(5 * MIB)
    assert not MemoryReservation(memory).reserve(2 * MIB), "no body has been arriving for too long"
    now = 31.0
    assert MemoryReservation(memory).reserve(2 * MIB)
    assert lost == ["old"]
    assert old.refused
    now = 90.0
    assert not MemoryReservation(memory).reserve(13 * MIB)
    assert lost == ["old", "young"]
    assert whole.size == 4 * MIB, "it is complete, it waits for its handler"
