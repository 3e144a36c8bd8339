"""Compares prompts by the ids of their blocks. Pure.

An id stands for all the text of a prompt up to the end of its block: where two prompts have the same id at one place,
all before it is the same too.
"""

from __future__ import annotations


def common_blocks(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """The number of blocks with which both begin: bisection finds the last pair of equal ids."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def begins_with(blocks: tuple[int, ...], beginning: tuple[int, ...]) -> bool:
    """Whether a prompt begins with all of another one."""
    return len(blocks) >= len(beginning) and (not beginning or blocks[len(beginning) - 1] == beginning[-1])
