"""Draws the bars of a pool: which layers of the model a device holds, and what its memory is used for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from gpumesh.pools.base import DeviceShare

# The parts of a memory bar in the order in which they are drawn: what it is, its character, its style for rich.
WEIGHTS = ("weights", "█", "cyan")
KV_CACHE = ("KV cache", "▓", "green")
COMPUTE = ("compute", "▒", "yellow")
FREE = ("free", "░", "dim")
OTHERS = ("other programs", "x", "dim")
BAR_PARTS = (WEIGHTS, KV_CACHE, COMPUTE, FREE, OTHERS)


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a device's memory is used for, in bytes, if the plan is carried out."""

    weights: int
    kv: int
    compute: int
    free: int
    others: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute + self.free + self.others


def memory_use(share: DeviceShare) -> MemoryUse:
    """The use of a GPU's whole memory. Of a CPU, and of a GPU whose size is not known, it is the use of what the plan
    may take. If the share does not fit, the sum is larger than the memory."""
    device = share.device
    whole = device.total_bytes if device.index is not None else None
    others = 0 if whole is None else max(whole - device.free_bytes, 0)
    available = share.offered_bytes if whole is None else min(device.free_bytes, whole)
    free = max(available - share.needed_bytes, 0)
    return MemoryUse(share.weights_bytes, share.kv_bytes, share.compute_bytes, free, others)


def memory_bar(use: MemoryUse, length: int) -> Text:
    """The use as a bar of ``length`` characters. Each part that is not empty has at least one character, if there is
    room for that."""
    sizes = (use.weights, use.kv, use.compute, use.free, use.others)
    text = Text()
    for (_, character, style), count in zip(BAR_PARTS, divide(length, sizes), strict=True):
        text.append(character * count, style=style)
    return text


def divide(length: int, sizes: Sequence[int]) -> list[int]:
    """Divides ``length`` characters in proportion to the sizes. A size above 0 gets one character at least, which the
    largest part gives up. The counts add up to ``length``; all are 0 if all sizes are."""
    total = sum(sizes)
    if total <= 0:
        return [0 for _ in sizes]
    counts: list[int] = []
    sum_of_sizes, end_of_previous = 0, 0
    for size in sizes:
        sum_of_sizes += size
        end = round(length * sum_of_sizes / total)
        counts.append(end - end_of_previous)
        end_of_previous = end
    for index, size in enumerate(sizes):
        largest = max(counts)
        if size > 0 and counts[index] == 0 and largest > 1:
            counts[counts.index(largest)] -= 1
            counts[index] = 1
    return counts


def bar_legend() -> Text:
    """What the characters of a memory bar mean."""
    text = Text()
    for name, character, style in BAR_PARTS:
        text.append("  " if text else "").append(character, style=style).append(f" {name}", style="dim")
    return text


def layer_bar(first_layer: int, layers: int, all_layers: int, length: int) -> Text:
    """The whole model as ``length`` characters, of which those stand out that are the layers of one device. A device
    with a layer has one character at least."""
    if not layers or all_layers <= 0:
        return Text("░" * length, style="dim")
    start = min(length * first_layer // all_layers, length - 1)
    end = min(max(length * (first_layer + layers) // all_layers, start + 1), length)
    text = Text("░" * start, style="dim")
    return text.append("█" * (end - start), style="cyan").append("░" * (length - end), style="dim")


def layer_range(share: DeviceShare) -> str:
    """The numbers of a share's layers, from 0: ``0-39``; ``none`` if it has none."""
    if not share.layers:
        return "none"
    last_layer = share.first_layer + share.layers - 1
    return f"{share.first_layer}-{last_layer}" if share.layers > 1 else str(share.first_layer)
