"""Divides the layers of a model among devices. llama.cpp gives each device layers that follow each other.

The devices are in llama.cpp's order: the head's CPU (llama.cpp leaves it the first layers), the workers, and the head's
GPUs. So the output is on the head if it has a GPU, and the probabilities of all words need not come from a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from gpumesh.pools.base import ModelShape
from gpumesh.pools.planning.compute_buffers import compute_bytes
from gpumesh.pools.planning.memory import LayerNeed, Load, Slot, layer_needs


@dataclass(frozen=True, slots=True)
class Model:
    """A model with what is asked of it. ``needs`` has one entry for each block, and one for the output;
    ``needed_before``, for each of these and for the end, the sum of the bytes before it."""

    shape: ModelShape
    load: Load
    needs: tuple[LayerNeed, ...]
    needed_before: tuple[int, ...]

    @classmethod
    def of(cls, shape: ModelShape, load: Load) -> Model:
        needs = layer_needs(shape, load)
        return cls(shape, load, needs, tuple(accumulate((need.bytes for need in needs), initial=0)))

    def input_bytes(self, slot: Slot) -> int:
        """The token embeddings, if they are on this device: they are on the head's CPU always."""
        return self.shape.input_bytes if slot.is_head_cpu else 0

    def compute_bytes(self, first: int, count: int) -> int:
        """The compute buffer of a device with ``count`` layers from layer ``first`` on."""
        if not count:
            return 0
        return compute_bytes(self.shape, self.load, first, count)

    def needed_bytes(self, slot: Slot, first: int, count: int) -> int:
        layers = self.needed_before[first + count] - self.needed_before[first]
        return layers + self.compute_bytes(first, count) + self.input_bytes(slot)

    def fits(self, slot: Slot, first: int, count: int) -> bool:
        return count == 0 or self.needed_bytes(slot, first, count) <= slot.for_layers


@dataclass(frozen=True, slots=True)
class Part:
    """The layers of one device: ``count`` of them, from layer ``first`` on. The output counts as the last layer."""

    slot: Slot
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Split:
    """``parts`` are in the order of the devices. ``missing_bytes``: with so much more memory, all layers would have a
    place (0: all have)."""

    parts: tuple[Part, ...]
    missing_bytes: int = 0

    @property
    def fits(self) -> bool:
        return not self.missing_bytes


def split_from_the_end(model: Model, slots: Sequence[Slot], *, use_head_cpu: bool = True) -> Split:
    """Fills the head's CPU from the first layer on, then the other devices from the last layer and the last device on.

    The last devices are the head's and those of the nearest workers: as few layers as possible are far away.
    ``use_head_cpu``: whether the head's CPU takes layers where there are other devices.
    """
    first, end = 0, len(model.needs)
    parts: list[Part] = []
    others = list(slots)
    if slots and slots[0].is_head_cpu:
        cpu = others.pop(0)
        most = end - 1 if others else end  # the output is on the last of the devices
        while (use_head_cpu or not others) and first < most and model.fits(cpu, 0, first + 1):
            first += 1
        parts.append(Part(cpu, 0, first))
    before = len(parts)
    for slot in reversed(others):
        count = 0
        while first < end and model.fits(slot, end - 1, count + 1):
            count += 1
            end -= 1
        parts.insert(before, Part(slot, end, count))
    return Split(tuple(parts), _missing_bytes(model, parts, first, end))


def split_by_speed(model: Model, slots: Sequence[Slot]) -> Split | None:
    """Gives the fastest devices as many layers as they hold; ``None`` if that does not work out.

    How many they hold is taken from the mean of all layers, and then looked at with the real ones.
    """
    mean = max(1.0, model.needed_before[-1] / len(model.needs))
    left = len(model.needs)
    counts = [0] * len(slots)
    for index in sorted(range(len(slots)), key=lambda index: -(slots[index].device.bytes_per_s or 0)):
        slot = slots[index]
        room = slot.for_layers - model.input_bytes(slot) - model.compute_bytes(0, len(model.needs))
        counts[index] = min(left, max(0, int(room / mean)))
        left -= counts[index]
    return split_as_given(model, slots, counts) if not left else None


def split_as_given(model: Model, slots: Sequence[Slot], counts: Sequence[int]) -> Split:
    """``missing_bytes`` is the sum of what each device has too little."""
    firsts = accumulate(counts, initial=0)
    parts = tuple(Part(slot, first, count) for slot, first, count in zip(slots, firsts, counts, strict=False))
    missing = (
        model.needed_bytes(part.slot, part.first, part.count) - part.slot.for_layers for part in parts if part.count
    )
    return Split(parts, sum(max(0, too_little) for too_little in missing))


def _missing_bytes(model: Model, parts: Sequence[Part], first: int, end: int) -> int:
    """What the device that was filled last has too little for the layers from ``first`` to ``end``, too."""
    if first == end:
        return 0
    if not parts:
        return model.needed_before[-1]
    last_filled = parts[1] if parts[0].slot.is_head_cpu and len(parts) > 1 else parts[0]
    if last_filled.first < first:  # the head's CPU is alone, and is filled from the first layer on
        return model.needed_bytes(last_filled.slot, 0, end) - last_filled.slot.for_layers
    needed = model.needed_bytes(last_filled.slot, first, last_filled.count + end - first)
    return needed - last_filled.slot.for_layers
