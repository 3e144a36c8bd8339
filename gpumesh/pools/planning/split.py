"""Divides the layers of a model among devices. llama.cpp gives each device layers that follow each other.

The devices are in llama.cpp's order: the head's CPU (llama.cpp leaves it the first layers), the workers, and the head's
GPUs. So the output is on the head if it has a GPU, and the probabilities of all words need not come from a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from gpumesh.pools.base import ModelShape
from gpumesh.pools.planning.buffers.compute_buffers import Place, compute_bytes
from gpumesh.pools.planning.memory import LayerNeed, Load, Slot, layer_needs, shared_bytes


@dataclass(frozen=True, slots=True)
class Part:
    """The layers of one device: ``count`` of them, from layer ``first`` on. The output counts as the last layer."""

    slot: Slot
    first: int
    count: int


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

    def weights_bytes(self, part: Part) -> int:
        """The token embeddings are on the head's CPU always; for an output that uses them, they are not needed again
        there."""
        weights = sum(need.weights for need in self.needs[part.first : part.first + part.count])
        return weights + self._extra_bytes(part)

    def compute_bytes(self, part: Part, cpu_layers: int) -> int:
        """The compute buffer of a device with these layers, when ``cpu_layers`` are on the head's CPU."""
        slot = part.slot
        if not part.count and not slot.is_head_cpu:
            return 0
        place = Place(part.first, part.count, cpu_layers, is_head_cpu=slot.is_head_cpu, is_gpu=slot.is_gpu)
        return compute_bytes(self.shape, self.load, place)

    def needed_bytes(self, part: Part, cpu_layers: int) -> int:
        """All that the device needs for these layers."""
        layers = self.needed_before[part.first + part.count] - self.needed_before[part.first]
        return layers + self._extra_bytes(part) + self.compute_bytes(part, cpu_layers)

    def missing_bytes(self, part: Part, cpu_layers: int) -> int:
        """What the device has too little for these layers; 0 or less if they fit."""
        if not part.count and not part.slot.is_head_cpu:
            return 0
        return self.needed_bytes(part, cpu_layers) - part.slot.for_layers

    def _extra_bytes(self, part: Part) -> int:
        """The weights that the device has beside its layers."""
        if not part.slot.is_head_cpu:
            return 0
        has_output = part.first + part.count == len(self.needs)
        return self.shape.input_bytes - (shared_bytes(self.shape) if has_output else 0)


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
        while (use_head_cpu or not others) and first < most and _holds(model, Part(cpu, 0, first + 1), first + 1):
            first += 1
        parts.append(Part(cpu, 0, first))
    before, cpu_layers = len(parts), first
    for slot in reversed(others):
        count = 0
        while first < end and _holds(model, Part(slot, end - 1, count + 1), cpu_layers):
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
        fixed = model.compute_bytes(Part(slot, 0, len(model.needs)), 0)
        fixed += model.shape.input_bytes if slot.is_head_cpu else 0
        counts[index] = min(left, max(0, int((slot.for_layers - fixed) / mean)))
        left -= counts[index]
    return split_as_given(model, slots, counts) if not left else None


def split_as_given(model: Model, slots: Sequence[Slot], counts: Sequence[int]) -> Split:
    """``missing_bytes`` is the sum of what each device has too little."""
    firsts = accumulate(counts, initial=0)
    parts = tuple(Part(slot, first, count) for slot, first, count in zip(slots, firsts, counts, strict=False))
    cpu_layers = sum(part.count for part in parts if part.slot.is_head_cpu)
    return Split(parts, sum(max(0, model.missing_bytes(part, cpu_layers)) for part in parts))


def _holds(model: Model, part: Part, cpu_layers: int) -> bool:
    return model.missing_bytes(part, cpu_layers) <= 0


def _missing_bytes(model: Model, parts: Sequence[Part], first: int, end: int) -> int:
    """What the device that was filled last has too little for the layers from ``first`` to ``end``, too; and what the
    head's CPU has too little for the token embeddings."""
    if not parts:
        return model.needed_before[-1]
    cpu = parts[0] if parts[0].slot.is_head_cpu else None
    if cpu and len(parts) == 1:
        return max(0, model.missing_bytes(replace(cpu, count=end), end))
    missing = max(0, model.missing_bytes(cpu, first)) if cpu else 0
    if first < end:
        last_filled = parts[1] if cpu else parts[0]
        whole = replace(last_filled, first=first, count=last_filled.count + end - first)
        missing += model.missing_bytes(whole, first)
    return missing
