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
OLLAMA = ("Ollama", "o", "dim")
OTHERS = ("other programs", "x", "dim")
BAR_PARTS = (WEIGHTS, KV_CACHE, COMPUTE, FREE, OLLAMA, OTHERS)


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a device's memory is used for, in bytes, if the plan is carried out. ``ollama``: models that Ollama could
    unload, and need not."""

    weights: int
    kv: int
    compute: int
    free: int
    ollama: int
    others: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of ``BAR_PARTS``."""
        return self.weights, self.kv, self.compute, self.free, self.ollama, self.others


def memory_use(share: DeviceShare) -> MemoryUse:
    """The use of a GPU's whole memory. Of a CPU, and of a GPU whose size is not known, it is the use of what the plan
    may take. If the share does not fit, the sum is larger than the memory."""
    device, needed = share.device, share.needed_bytes
    whole = device.total_bytes if device.index is not None else None
    if whole is None:
        free, ollama, others = max(share.offered_bytes - needed, 0), 0, 0
    else:
        taken_from_ollama = max(needed - device.free_bytes, 0)
        free = max(device.free_bytes - needed, 0)
        ollama = max(device.held_by_others - taken_from_ollama, 0)
        others = max(whole - device.free_bytes - device.held_by_others, 0)
    return MemoryUse(share.weights_bytes, share.kv_bytes, share.compute_bytes, free, ollama, others)


def memory_bar(use: MemoryUse, length: int) -> Text:
    """The use as a bar of ``length`` characters. Each part that is not empty has at least one character, if there is
    room for that."""
    text = Text()
    for (_, character, style), count in zip(BAR_PARTS, divide(length, use.sizes), strict=True):
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


def bar_legend(uses: Sequence[MemoryUse]) -> Text:
    """What the characters of these memory bars mean."""
    text = Text()
    for position, (name, character, style) in enumerate(BAR_PARTS):
        if not any(use.sizes[position] for use in uses):
            continue
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
