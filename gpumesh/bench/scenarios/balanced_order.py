"""Orders in which several items (such as routes) are measured in turn, so that no order favours one of them. Pure.

A Williams square has each item once in each row and equally often in each position, and each item follows each other
item equally often: so what an item leaves behind (a warm cache, a busy connection) meets all others alike. (Williams,
"Experimental designs balanced for the estimation of residual effects of treatments", Australian Journal of Scientific
Research 2, 1949.) Which item takes which place in the square, and the order of its rows, are drawn at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def balanced_rounds(items: Sequence[T], rounds: int, rng: Random) -> Iterator[tuple[T, ...]]:
    """Yields ``rounds`` rounds, each with all items in another order. The orders are the rows of a Williams square, and
    of further squares if one has too few rows."""
    left = rounds if items else 0
    while left > 0:
        labels = rng.sample(items, len(items))
        rows = williams_square(len(items))
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
