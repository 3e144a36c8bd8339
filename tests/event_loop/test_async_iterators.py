from __future__ import annotations

from collections.abc import AsyncGenerator

from gpumesh.event_loop.async_iterators import closing_iterator


class Items:
    """An iterator that is no generator: there is nothing to close."""

    def __init__(self) -> None:
        self.left = 2

    def __aiter__(self) -> Items:
        return self

    async def __anext__(self) -> int:
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        return self.left


async def test_a_generator_is_closed_with_the_block() -> None:
    ended = []

    async def items() -> AsyncGenerator[int]:
        try:
            yield 1
            yield 2
        finally:
            ended.append(True)

    async with closing_iterator(items()) as found:
        async for item in found:
            assert item == 1
            break
        assert ended == []
    assert ended == [True]


async def test_an_iterator_without_aclose_is_accepted() -> None:
    async with closing_iterator(Items()) as found:
        assert [item async for item in found] == [1, 0]
