"""The members of a pool that can take part, with their devices, in the order of their distance from the head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import HostOffer, PathKind, WorkerPath
from gpumesh.pools.planning.memory import Slot, slots_of

# The rates and round trips that are assumed for choosing a split when they have not been measured.
ASSUMED_GPU_BYTES_PER_S = 300e9
ASSUMED_CPU_BYTES_PER_S = 20e9
ASSUMED_RTT_MS = 20.0
ASSUMED_LINK_BYTES_PER_S = 10e6


@dataclass(frozen=True, slots=True)
class Worker:
    """A member other than the head, with the way to it."""

    node: str
    slots: tuple[Slot, ...]
    path: WorkerPath


@dataclass(frozen=True, slots=True)
class Hosts:
    """``workers`` are in the order of their round trip, the nearest first. A member that can take no part is not among
    them; a head that cannot has no slots."""

    head: str
    head_slots: tuple[Slot, ...]
    workers: tuple[Worker, ...]

    def chain(self, workers: Sequence[Worker]) -> tuple[Slot, ...]:
        """The devices of the head and of these workers in llama.cpp's order."""
        cpu = tuple(slot for slot in self.head_slots if not slot.is_gpu)
        gpus = tuple(slot for slot in self.head_slots if slot.is_gpu)
        far_first = tuple(slot for worker in reversed(workers) for slot in worker.slots)
        return (*cpu, *far_first, *gpus)


def gather_hosts(
    spec: PoolSpec, offers: Sequence[HostOffer], paths: Mapping[str, WorkerPath], *, draft_bytes: int, unload: bool
) -> Hosts:
    """``draft_bytes`` of the draft model are set aside on the head's fastest device."""
    head_slots: tuple[Slot, ...] = ()
    workers = []
    for offer in offers:
        if offer.problem is not None:
            continue
        slots = slots_of(offer, is_head=offer.node == spec.head, unload=unload)
        if offer.node == spec.head:
            head_slots = _set_draft_aside(slots, draft_bytes)
        else:
            workers.append(Worker(offer.node, slots, paths.get(offer.node) or WorkerPath(PathKind.THROUGH_US, None)))
    return Hosts(spec.head, head_slots, tuple(sorted(workers, key=_distance)))


def assume_unknown(slot: Slot) -> Slot:
    """The slot, its device with an assumed rate if its rate is not known."""
    if slot.device.bytes_per_s is not None:
        return slot
    rate = ASSUMED_GPU_BYTES_PER_S if slot.is_gpu else ASSUMED_CPU_BYTES_PER_S
    return replace(slot, device=replace(slot.device, bytes_per_s=rate))


def assume_unknown_path(path: WorkerPath) -> WorkerPath:
    rtt_ms = ASSUMED_RTT_MS if path.rtt_ms is None else path.rtt_ms
    return replace(path, rtt_ms=rtt_ms, bytes_per_s=path.bytes_per_s or ASSUMED_LINK_BYTES_PER_S)


def _set_draft_aside(slots: tuple[Slot, ...], draft_bytes: int) -> tuple[Slot, ...]:
    if not slots or not draft_bytes:
        return slots
    fastest = max(range(len(slots)), key=lambda index: slots[index].device.bytes_per_s or 0)
    return tuple(replace(slot, draft=draft_bytes) if i == fastest else slot for i, slot in enumerate(slots))


def _distance(worker: Worker) -> tuple[float, int, str]:
    """The round trip; for equal ones, the worker with more memory is the first."""
    rtt_ms = math.inf if worker.path.rtt_ms is None else worker.path.rtt_ms
    return rtt_ms, -sum(slot.for_layers for slot in worker.slots), worker.node
