"""Orders in which several things are measured in turn, so that no order favours one of them. Pure.

A Williams square has each thing once in each row and equally often in each position, and each thing follows each other
one equally often: so what one leaves behind (a warm cache, a busy connection) meets all others alike. (Williams,
"Experimental designs balanced for the estimation of residual effects of treatments", Australian Journal of Scientific
Research 2, 1949.) Which thing takes which place in the square, and the order of its rows, are drawn at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def balanced_rounds(things: Sequence[T], rounds: int, rng: Random) -> Iterator[tuple[T, ...]]:
    """Yields so many rounds, each with all things in another order. A new square begins when one is used up."""
    left = rounds if things else 0
    while left > 0:
        labels = rng.sample(things, len(things))
        rows = williams_square(len(things))
        rng.shuffle(rows)
        for row in rows[:left]:
            yield tuple(labels[number] for number in row)
        left -= len(rows)


def williams_square(size: int) -> list[list[int]]:
    """The rows of the square for the numbers below ``size``: as many rows, or twice as many for an odd ``size``."""
    # 0, 1, size - 1, 2, size - 2, …: each difference between neighbours occurs once.
    first = [0]
    for number in range(1, size):
        first.append((number + 1) // 2 if number % 2 else size - number // 2)
    rows = [[(number + shift) % size for number in first] for shift in range(size)]
    return rows if size % 2 == 0 else rows + [row[::-1] for row in rows]
