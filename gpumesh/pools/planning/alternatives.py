"""What would fit instead of a pool that does not, and what would be faster than one that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from gpumesh.pool_spec import KvType, PoolSpec
from gpumesh.pools.base import HostOffer, ModelShape
from gpumesh.pools.planning.choice import choose_split, fits_on_all, forecast, members_of
from gpumesh.pools.planning.hosts import Hosts
from gpumesh.pools.planning.memory import CELL_PADDING, Load, can_quantise_cache, slots_of
from gpumesh.pools.planning.quantisations import LOWEST_GOOD_BITS, smaller_shapes
from gpumesh.pools.planning.split import Model
from gpumesh.text.sentences import join_all

# A context below this is no use.
SMALLEST_CONTEXT = 512
REDUCED_CONTEXT = 4096
SMALLER_KV_TYPES = {KvType.F16: (KvType.Q8_0, KvType.Q4_0), KvType.Q8_0: (KvType.Q4_0,), KvType.Q4_0: ()}


def describe_what_fits(spec: PoolSpec, shape: ModelShape, hosts: Hosts) -> Iterator[str]:
    """One sentence for each change that would be enough alone, from the least to the most drastic; if none is, one with
    several changes."""
    load = Load.of(spec)
    found = False

    def fits(other: Load) -> bool:
        return fits_on_all(Model.of(shape, other), hosts)

    for kv_type in SMALLER_KV_TYPES[spec.kv_type] if can_quantise_cache(shape) else ():
        if fits(replace(load, kv_type=kv_type)):
            yield f"It would fit with kv_type: {kv_type}."
            found = True
            break
    context = _largest(spec.context // CELL_PADDING, lambda steps: fits(replace(load, context=steps * CELL_PADDING)))
    if context * CELL_PADDING >= SMALLEST_CONTEXT:
        yield f"It would fit with context: {context * CELL_PADDING}."
        found = True
    parallel = _largest(spec.parallel - 1, lambda streams: fits(replace(load, parallel=streams)))
    if parallel:
        yield f"It would fit with parallel: {parallel}."
        found = True
    smaller = _best_quantisation(shape, load, hosts)
    if smaller is not None:
        yield f"It would fit with a file of the quantisation {smaller.file_type} ({describe_gib(smaller.file_bytes)})."
    elif not found:
        yield _describe_several_changes(shape, load, hosts)


def _describe_several_changes(shape: ModelShape, load: Load, hosts: Hosts) -> str:
    """What is asked of the model is reduced step by step, until a quantisation fits: one of good quality, if any is."""
    for lowest_bits in (LOWEST_GOOD_BITS, 0.0):
        changes = []
        for name, value, smaller_load in _reductions(shape, load):
            changes.append(f"{name}: {value}")
            if fits_on_all(Model.of(shape, smaller_load), hosts):
                return f"It would fit with {join_all(changes)}."
            smaller = _best_quantisation(shape, smaller_load, hosts, lowest_bits=lowest_bits)
            if smaller is not None:
                file = f"a file of the quantisation {smaller.file_type} ({describe_gib(smaller.file_bytes)})"
                return f"It would fit with {join_all([*changes, file])}."
    return "No quantisation is small enough: the pool needs more members, or a smaller model."


def _reductions(shape: ModelShape, load: Load) -> Iterator[tuple[str, object, Load]]:
    """Each smaller load, with the key of mesh.yaml that makes it smaller than the one before."""
    if load.parallel > 1:
        load = replace(load, parallel=1)
        yield "parallel", 1, load
    if load.kv_type is KvType.F16 and can_quantise_cache(shape):
        load = replace(load, kv_type=KvType.Q8_0)
        yield "kv_type", KvType.Q8_0, load
    if load.context > REDUCED_CONTEXT:
        yield "context", REDUCED_CONTEXT, replace(load, context=REDUCED_CONTEXT)


def _best_quantisation(shape: ModelShape, load: Load, hosts: Hosts, *, lowest_bits: float = 0.0) -> ModelShape | None:
    candidates = (smaller for _, smaller in smaller_shapes(shape, lowest_bits=lowest_bits))
    return next((smaller for smaller in candidates if fits_on_all(Model.of(smaller, load), hosts)), None)


@dataclass(frozen=True, slots=True)
class SingleNode:
    """A node that holds the model alone. ``file_type``: with which quantisation; ``None``: the file as it is."""

    node: str
    file_type: str | None
    file_bytes: int
    tokens_per_s: float | None


def find_single_nodes(spec: PoolSpec, shape: ModelShape, offers: Sequence[HostOffer]) -> Iterator[SingleNode]:
    """For each node that can hold the model alone, as it is or with a smaller quantisation of good quality: the best
    one."""
    for offer in offers:
        if offer.problem is not None:
            continue
        alone = Hosts(offer.node, slots_of(offer, is_head=True, unload=spec.unload), ())
        for name, candidate in ((None, shape), *smaller_shapes(shape, lowest_bits=LOWEST_GOOD_BITS)):
            model = Model.of(candidate, Load.of(spec))
            if alone.head_slots and fits_on_all(model, alone):
                speed = forecast(model, members_of(model, alone, choose_split(model, alone), [offer.node]))
                yield SingleNode(offer.node, name, candidate.file_bytes, speed.tokens_per_s if speed else None)
                break


def describe_gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number from 1 to ``most`` for which it holds, where it holds for all smaller ones too; else 0."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
