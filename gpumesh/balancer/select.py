"""Selects the nodes that can serve a request at all, before a policy ranks them; and explains why no node can. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice, zip_longest
from weakref import WeakKeyDictionary

import msgspec

from gpumesh.backends.dialects import KINDS_WITH_MODEL_STORE
from gpumesh.balancer.base import Candidate, Demand
from gpumesh.errors import GPUMeshError, ModelMissing, NoNodeError
from gpumesh.model_names import full_name
from gpumesh.quoting import paste_command

MAX_SHOWN_MODELS = 50  # in a sentence for people
MAX_LISTED_MODELS = 1000  # in an error's data


def has_model(candidate: Candidate, model: str | None) -> bool:
    """Whether the node has the model. Also true when the node could not list its models: then it may be tried."""
    if model is None or candidate.models is None:
        return True
    return model in candidate.models or full_name(model) in full_names(candidate.models)


_full_names: WeakKeyDictionary[frozenset[str], frozenset[str]] = WeakKeyDictionary()


def full_names(models: AbstractSet[str]) -> frozenset[str]:
    """The full names of a list of models. They are cached as long as the list itself exists: each request needs them,
    and a node that lists thousands of models must not slow down the requests to all other nodes."""
    key = frozenset(models)  # the same object if it is one already: then the entry lives as long as the caller's set
    names = _full_names.get(key)
    if names is None:
        names = _full_names[key] = frozenset(full_name(name) for name in key)
    return names


class Selection(msgspec.Struct, frozen=True):
    """The nodes that can serve a demand, in no order. Those in ``free`` have a free slot, those in ``busy`` have
    none."""

    free: tuple[Candidate, ...]
    busy: tuple[Candidate, ...]


def select_candidates(candidates: Sequence[Candidate], demand: Demand, *, exclude: Collection[str] = ()) -> Selection:
    """The nodes that can serve this demand, those with a free slot apart from those without."""
    loads = group_loads(candidates)
    free: list[Candidate] = []
    busy: list[Candidate] = []
    for candidate in candidates:
        if not _can_serve(candidate, demand) or candidate.name in exclude:
            continue
        has_slot = not demand.needs_slot or candidate.limit is None or loads[gpu_group(candidate)] < candidate.limit
        (free if has_slot else busy).append(candidate)
    return Selection(tuple(free), tuple(busy))


def _can_serve(candidate: Candidate, demand: Demand) -> bool:
    return (
        candidate.usable
        and candidate.kind in demand.kinds
        and (demand.node is None or candidate.name == demand.node)
        and has_model(candidate, demand.model)
    )


def gpu_group(candidate: Candidate) -> str:
    """The name of the group of nodes that share this node's GPU; the node's own name where no other node does."""
    return candidate.group or candidate.name


def group_loads(candidates: Sequence[Candidate]) -> dict[str, int]:
    """Requests in flight on each GPU, over all of its nodes and from all gateways."""
    loads: dict[str, int] = {}
    for candidate in candidates:
        group = gpu_group(candidate)
        loads[group] = loads.get(group, 0) + candidate.in_flight + candidate.other_gateways_in_flight
    return loads


def no_node_error(candidates: Sequence[Candidate], demand: Demand, *, exclude: Collection[str] = ()) -> GPUMeshError:
    """The error to raise when ``select_candidates`` found no node: it says why."""
    if demand.node is not None and all(candidate.name != demand.node for candidate in candidates):
        names = ", ".join(sorted(candidate.name for candidate in candidates)) or "none"
        return NoNodeError(f"there is no node {demand.node!r}", hint=f"the nodes are: {names}")
    allowed = [candidate for candidate in candidates if demand.node in (None, candidate.name)]
    usable = [candidate for candidate in allowed if candidate.usable]
    if not usable:
        subject = f"node {demand.node!r} is not" if demand.node is not None else "no node is"
        return NoNodeError(f"{subject} usable now", node=demand.node)
    if demand.model is not None and not any(has_model(candidate, demand.model) for candidate in usable):
        unusable = [candidate for candidate in allowed if not candidate.usable]
        return _missing_model_error(demand.model, usable, unusable)
    if not any(candidate.kind in demand.kinds for candidate in usable):
        kinds = ", ".join(sorted(demand.kinds))
        return NoNodeError(
            f"no node that is up speaks this API ({kinds})",
            hint="native Ollama routes need a node of kind ollama; /v1 routes work with every kind",
        )
    tried = ", ".join(sorted(exclude))
    return NoNodeError(f"every node that could serve this has failed it ({tried})")


def _missing_model_error(model: str, usable: Sequence[Candidate], unusable: Sequence[Candidate]) -> ModelMissing:
    """The hint names the unusable nodes that have the model, the models of the usable nodes, and a command to pull the
    model."""
    available = _list_models(usable)
    unusable_with_model = [candidate.name for candidate in unusable if has_model(candidate, model)]
    hint = f"it is on {', '.join(unusable_with_model)}, which cannot be used now; " if unusable_with_model else ""
    hint += f"there are: {', '.join(available[:MAX_SHOWN_MODELS]) or 'no models'}"
    hint += " …" if len(available) > MAX_SHOWN_MODELS else ""
    pull_targets = [candidate.name for candidate in usable if candidate.kind in KINDS_WITH_MODEL_STORE]
    if pull_targets:
        hint += f"; it could be pulled to {', '.join(pull_targets)}: "
        hint += paste_command("gpumesh models pull {MODEL}", MODEL=model)
    return ModelMissing(model, available=tuple(available), hint=hint)


def _list_models(candidates: Sequence[Candidate]) -> list[str]:
    """The names of models. Few names are sorted. Of many names the nodes give one each in turn, so that a node with
    very many does not push out those of the others."""
    lists = [sorted(candidate.models or ()) for candidate in candidates]
    names = sorted({name for models in lists for name in models[:MAX_LISTED_MODELS]})
    if len(names) <= MAX_SHOWN_MODELS:
        return names
    in_turn = dict.fromkeys(name for row in zip_longest(*lists) for name in row if name is not None)
    return list(islice(in_turn, MAX_LISTED_MODELS))
