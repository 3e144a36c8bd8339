"""Who may get a request at all, before any policy ranks them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice, zip_longest
from weakref import WeakKeyDictionary

from gpumesh.backends.dialects import KINDS_WITH_MODEL_STORE
from gpumesh.balancer.base import Candidate, Demand
from gpumesh.errors import GPUMeshError, ModelMissing, NoNodeError
from gpumesh.quoting import paste_command

SHOWN_MODELS = 50  # in a sentence for people
MOST_MODELS = 1000  # in an error's data


def same_model(asked: str, listed: str) -> bool:
    """Ollama's rule: a name without a tag means ``:latest``; names are compared without case."""
    return full_name(asked) == full_name(listed)


def full_name(model: str) -> str:
    """``qwen2.5`` -> ``qwen2.5:latest``; a registry's port is no tag (``host:5000/m`` -> ``host:5000/m:latest``)."""
    name = model.strip().lower()
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"


def has_model(candidate: Candidate, model: str | None) -> bool:
    """True as well when the node could not list its models: it may be tried."""
    if model is None or candidate.models is None:
        return True
    return model in candidate.models or full_name(model) in full_names(candidate.models)


_full_names: WeakKeyDictionary[frozenset[str], frozenset[str]] = WeakKeyDictionary()


def full_names(models: AbstractSet[str]) -> frozenset[str]:
    """Remembered as long as the list itself is, since it is asked for with each request and changes seldom: a node that
    lists thousands must not cost the requests of all others the time to read its list."""
    key = frozenset(models)  # itself, if it is one
    names = _full_names.get(key)
    if names is None:
        names = _full_names[key] = frozenset(full_name(name) for name in key)
    return names


@dataclass(frozen=True, slots=True)
class Selection:
    """``free``: those with a free place. ``busy``: those that would serve, once they have one. Both in no order."""

    free: tuple[Candidate, ...]
    busy: tuple[Candidate, ...]


def select_candidates(candidates: Sequence[Candidate], demand: Demand, *, exclude: Collection[str] = ()) -> Selection:
    """Splits the nodes that can answer this demand into those with a free place and those without."""
    loads = group_loads(candidates)
    now: list[Candidate] = []
    later: list[Candidate] = []
    for candidate in candidates:
        if not _can_serve(candidate, demand) or candidate.name in exclude:
            continue
        place_free = not demand.needs_slot or candidate.limit is None or loads[gpu_group(candidate)] < candidate.limit
        (now if place_free else later).append(candidate)
    return Selection(tuple(now), tuple(later))


def _can_serve(candidate: Candidate, demand: Demand) -> bool:
    return (
        candidate.usable
        and candidate.kind in demand.kinds
        and (demand.node is None or candidate.name == demand.node)
        and has_model(candidate, demand.model)
    )


def gpu_group(candidate: Candidate) -> str:
    """Which GPU this node uses, as a name: its own, unless other nodes share it."""
    return candidate.group or candidate.name


def group_loads(candidates: Sequence[Candidate]) -> dict[str, int]:
    """What is in flight or waits on each GPU, whichever of its nodes it went through."""
    loads: dict[str, int] = {}
    for candidate in candidates:
        loads[gpu_group(candidate)] = loads.get(gpu_group(candidate), 0) + candidate.in_flight + candidate.queued
    return loads


def _some_models(candidates: Sequence[Candidate]) -> list[str]:
    """Names of models, in their order where they are few; else some of each node's, so that none hides the others."""
    held = [sorted(candidate.models or ()) for candidate in candidates]
    names = sorted({name for models in held for name in models[:MOST_MODELS]})
    if len(names) <= SHOWN_MODELS:
        return names
    turns = dict.fromkeys(name for row in zip_longest(*held) for name in row if name is not None)
    return list(islice(turns, MOST_MODELS))


def no_node_error(candidates: Sequence[Candidate], demand: Demand, *, exclude: Collection[str] = ()) -> GPUMeshError:
    """The true reason why ``select_candidates`` found nobody, as the error to raise."""
    if demand.node is not None and all(candidate.name != demand.node for candidate in candidates):
        names = ", ".join(sorted(candidate.name for candidate in candidates)) or "none"
        return NoNodeError(f"there is no node {demand.node!r}", hint=f"the nodes are: {names}")
    pool = [candidate for candidate in candidates if demand.node in (None, candidate.name)]
    usable = [candidate for candidate in pool if candidate.usable]
    if not usable:
        who = f"node {demand.node!r} is not" if demand.node is not None else "no node is"
        return NoNodeError(f"{who} usable now", node=demand.node)
    if demand.model is not None and not any(has_model(candidate, demand.model) for candidate in usable):
        available = _some_models(usable)
        away = [candidate.name for candidate in pool if not candidate.usable and has_model(candidate, demand.model)]
        hint = f"it is on {', '.join(away)}, which cannot be used now; " if away else ""
        hint += f"there are: {', '.join(available[:SHOWN_MODELS]) or 'no models'}"
        hint += " …" if len(available) > SHOWN_MODELS else ""
        stores = [candidate.name for candidate in usable if candidate.kind in KINDS_WITH_MODEL_STORE]
        if stores:
            hint += f"; it could be pulled to {', '.join(stores)}: "
            hint += paste_command("gpumesh models pull {MODEL}", MODEL=demand.model)
        return ModelMissing(demand.model, available=tuple(available), hint=hint)
    if not any(candidate.kind in demand.kinds for candidate in usable):
        kinds = ", ".join(sorted(demand.kinds))
        return NoNodeError(
            f"no node that is up speaks this API ({kinds})",
            hint="native Ollama routes need a node of kind ollama; /v1 routes work with every kind",
        )
    tried = ", ".join(sorted(exclude))
    return NoNodeError(f"every node that could serve this has failed it ({tried})")
