"""Chooses among all splits of a model the one that is expected to be the fastest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from gpumesh.pools.base import DeviceShare, MemberPlan, SpeedForecast
from gpumesh.pools.planning.hosts import Hosts, Worker, assume_unknown, assume_unknown_path
from gpumesh.pools.planning.speed import forecast_speed
from gpumesh.pools.planning.split import Model, Part, Split, split_as_given, split_by_speed, split_from_the_end

# Up to so many workers, each choice among them is tried.
MAX_WORKERS_FOR_ALL_CHOICES = 7
# A forecast is not more exact than this: among splits that are nearly as fast, the fewest workers win.
SAME_SPEED = 0.97


def choose_split(model: Model, hosts: Hosts) -> Split:
    """The fastest split that fits; with nearly the same speed, that with the fewest workers, and then that with the
    fewest layers on them. If none fits, the split over all members that fails by the least."""
    fitting = [split for split in _possible_splits(model, hosts) if split.fits]
    if not fitting:
        return split_from_the_end(model, hosts.chain(hosts.workers))
    rates = [_expected_rate(model, hosts, split) for split in fitting]
    best = max(rates)
    fast = [split for split, rate in zip(fitting, rates, strict=True) if rate >= SAME_SPEED * best]
    return min(fast, key=lambda split: (_count_workers(split), _bytes_on_workers(model, split)))


def fits_on_all(model: Model, hosts: Hosts) -> bool:
    """Whether the model fits when all members take part."""
    slots = hosts.chain(hosts.workers)
    return bool(slots) and split_from_the_end(model, slots).fits


def members_of(model: Model, hosts: Hosts, split: Split, nodes: Sequence[str]) -> tuple[MemberPlan, ...]:
    """The parts of all ``nodes``, the head first, then the workers from the nearest on, and then those that can take no
    part."""
    shares: dict[str, list[DeviceShare]] = {node: [] for node in nodes}
    cpu_layers = sum(part.count for part in split.parts if part.slot.is_head_cpu)
    for part in split.parts:
        shares[part.slot.node].append(_share(model, part, cpu_layers))
    used = {part.slot for part in split.parts}
    for slot in (*hosts.head_slots, *(slot for worker in hosts.workers for slot in worker.slots)):
        if slot not in used:
            shares[slot.node].append(_share(model, Part(slot, 0, 0), cpu_layers))
    paths = {worker.node: worker.path for worker in hosts.workers}
    order = [hosts.head, *paths, *(node for node in nodes if node != hosts.head and node not in paths)]
    return tuple(MemberPlan(node, node == hosts.head, tuple(shares[node]), paths.get(node)) for node in order)


def forecast(model: Model, members: Sequence[MemberPlan]) -> SpeedForecast | None:
    return forecast_speed(model.shape, members, context=model.load.context, parallel=model.load.parallel)


def _possible_splits(model: Model, hosts: Hosts) -> Iterator[Split]:
    for workers in _choices(hosts.workers):
        slots = hosts.chain(workers)
        if not slots:
            continue
        yield split_from_the_end(model, slots)
        yield split_from_the_end(model, slots, use_head_cpu=False)
        assumed = tuple(assume_unknown(slot) for slot in slots)
        by_speed = split_by_speed(model, assumed)
        if by_speed:
            yield split_as_given(model, slots, [part.count for part in by_speed.parts])


def _choices(workers: Sequence[Worker]) -> Iterator[Sequence[Worker]]:
    if len(workers) > MAX_WORKERS_FOR_ALL_CHOICES:
        yield from (workers[:count] for count in range(len(workers) + 1))
        return
    for count in range(len(workers) + 1):
        yield from combinations(workers, count)


def _expected_rate(model: Model, hosts: Hosts, split: Split) -> float:
    """Tokens per second of all streams; what is not known of devices and ways is assumed."""
    assumed = Split(tuple(replace(part, slot=assume_unknown(part.slot)) for part in split.parts))
    workers = tuple(replace(worker, path=assume_unknown_path(worker.path), slots=()) for worker in hosts.workers)
    known_hosts = Hosts(hosts.head, (), workers)
    nodes = [hosts.head, *(worker.node for worker in workers)]
    speed = forecast(model, members_of(model, known_hosts, assumed, nodes))
    return 0.0 if speed is None else speed.tokens_per_s_streams


def _count_workers(split: Split) -> int:
    return len({part.slot.node for part in split.parts if part.count and not part.slot.is_head})


def _bytes_on_workers(model: Model, split: Split) -> int:
    on_workers = (part for part in split.parts if not part.slot.is_head)
    return sum(need.weights for part in on_workers for need in model.needs[part.first : part.first + part.count])


def _share(model: Model, part: Part, cpu_layers: int) -> DeviceShare:
    needs = model.needs[part.first : part.first + part.count]
    return DeviceShare(
        device=part.slot.device,
        first_layer=part.first,
        layers=part.count,
        weights_bytes=model.weights_bytes(part),
        kv_bytes=sum(need.kv for need in needs),
        compute_bytes=model.compute_bytes(part, cpu_layers),
        offered_bytes=part.slot.offered,
        draft_bytes=part.slot.draft,
    )
