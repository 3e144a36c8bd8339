"""Selects the nodes that can serve a request at all, before a policy ranks them; and explains why no node can. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice, zip_longest
from typing import Protocol
from weakref import WeakKeyDictionary

from gpumesh.backends.dialects import KINDS_WITH_MODEL_STORE, find_dialect
from gpumesh.balancer.base import Candidate, Demand
from gpumesh.errors import GPUMeshError, ModelMissing, NoNodeError
from gpumesh.text.model_names import full_name
from gpumesh.text.quoting import paste_command
from gpumesh.topology import BackendKind


class Servable(Protocol):
    """What decides whether a node suits a demand: a ``Candidate``, or the balancer's ``NodeAccount``."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> BackendKind: ...

    @property
    def models(self) -> AbstractSet[str] | None: ...


class Requirements(Protocol):
    """What a request requires of its node, whatever happens there: a part of a ``Demand``, or a group of waiting
    requests."""

    @property
    def model(self) -> str | None: ...

    @property
    def kinds(self) -> frozenset[BackendKind]: ...

    @property
    def node(self) -> str | None: ...

    @property
    def nodes(self) -> frozenset[str] | None: ...


MAX_SHOWN_MODELS = 50  # in a sentence for people
MAX_HINTED_NODES = 3  # in the short hint for a program
MAX_HINTED_MODELS = 3
MAX_LISTED_MODELS = 1000  # in an error's data


def has_model(candidate: Servable, model: str | None) -> bool:
    """Whether the node has the model; true for ``None``. A node that could not list its models counts as having it, so
    that the node is tried."""
    if model is None or candidate.models is None:
        return True
    # The first test is only a shortcut: most clients write the name as the node lists it.
    return model in candidate.models or full_name(model) in full_names(candidate.models)


_full_names: WeakKeyDictionary[frozenset[str], frozenset[str]] = WeakKeyDictionary()
"""The cache of ``full_names``, by the set of models."""


def full_names(models: AbstractSet[str]) -> frozenset[str]:
    """The full names of a set of models. They are cached as long as the set itself exists: each request needs them,
    and a node that lists thousands of models must not slow down the requests to all other nodes."""
    # frozenset() returns a frozenset as it is. So the cache's entry lives as long as the caller's own set.
    key = frozenset(models)
    names = _full_names.get(key)
    if names is None:
        names = _full_names[key] = frozenset(full_name(name) for name in key)
    return names


def is_model_broken(candidate: Candidate, model: str | None) -> bool:
    """Whether the model must not be asked for on this node now, although the node may have it."""
    return bool(candidate.broken_models) and model is not None and full_name(model) in candidate.broken_models


def suits_demand(candidate: Servable, demand: Requirements) -> bool:
    """Whether the node could serve the demand if nothing were broken there: the demand allows the node, its server is
    of a demanded kind, and it has the model."""
    # The first two tests are ``allows_node``, the last line begins with the usual case of ``has_model``. Both are
    # written out because this function runs for each request and node.
    if demand.node is not None and candidate.name != demand.node:
        return False
    if demand.nodes is not None and candidate.name not in demand.nodes:
        return False
    if candidate.kind not in demand.kinds:
        return False
    models, model = candidate.models, demand.model
    return models is None or model in models or has_model(candidate, model)


def allows_node(demand: Demand, name: str) -> bool:
    """Whether the demand lets this node answer: it is the named node if the demand names one, and no rule excludes
    it."""
    return (demand.node is None or name == demand.node) and (demand.nodes is None or name in demand.nodes)


def meets_demand(candidate: Candidate, demand: Demand) -> bool:
    """Whether the node can serve the demand when it is usable and has a free slot: it suits the demand, and the model
    is not broken there. A demand that needs no slot is about the model store: it does not run the model, so it does
    not matter whether the model is broken."""
    is_broken = demand.needs_slot and is_model_broken(candidate, demand.model)
    return not is_broken and suits_demand(candidate, demand)


def no_node_error(candidates: Sequence[Candidate], demand: Demand, *, exclude: Collection[str] = ()) -> GPUMeshError:
    """The error that says why no node can serve the demand. ``exclude``: the nodes that have failed the
    request."""
    all_names = sorted(candidate.name for candidate in candidates)
    if demand.node is not None and demand.node not in all_names:
        return NoNodeError(f"there is no node {demand.node!r}", hint=f"the nodes are: {', '.join(all_names) or 'none'}")
    allowed = [candidate for candidate in candidates if allows_node(demand, candidate.name)]
    if not allowed and demand.nodes is not None:
        return _excluded_by_rules_error(demand, demand.nodes)
    usable = [candidate for candidate in allowed if candidate.usable]
    if not usable:
        return _none_usable_error(demand)
    with_model = [candidate for candidate in usable if has_model(candidate, demand.model)]
    # No usable node can serve the model, but a node that is away may have it. Then the model is not reported as
    # missing.
    if demand.model is not None and not any(candidate.kind in demand.kinds for candidate in with_model):
        away = [candidate for candidate in allowed if not candidate.usable and _may_have_model(candidate, demand)]
        if away:
            return _away_model_error(demand.model, away)
    if demand.model is not None and not with_model:
        return _missing_model_error(demand.model, usable)
    usable_of_kind = [candidate for candidate in usable if candidate.kind in demand.kinds]
    if not usable_of_kind:
        kinds = ", ".join(sorted(demand.kinds))
        return NoNodeError(
            f"no node that is up speaks this API ({kinds})",
            hint="native Ollama routes need a node of kind ollama; /v1 routes work with every kind",
        )
    # Some nodes have the model, and some nodes are of a demanded kind, but perhaps no node is both.
    if demand.model is not None and not any(has_model(candidate, demand.model) for candidate in usable_of_kind):
        return _missing_model_error(demand.model, usable_of_kind, wrong_kind=with_model)
    suited = [candidate for candidate in usable_of_kind if has_model(candidate, demand.model)]
    is_broken_everywhere = all(is_model_broken(candidate, demand.model) for candidate in suited)
    if demand.needs_slot and is_broken_everywhere:
        names = ", ".join(candidate.name for candidate in suited)
        return NoNodeError(f"{demand.model!r} cannot be used now where it is ({names})", node=demand.node)
    failed_nodes = ", ".join(sorted(exclude))
    return NoNodeError(f"every node that could serve this has failed it ({failed_nodes})")


def _none_usable_error(demand: Demand) -> NoNodeError:
    """The error if no node that the demand allows is usable now."""
    subject = "no node is"
    if demand.node is not None:
        subject = f"node {demand.node!r} is not"
    elif demand.nodes is not None:
        subject = f"none of the nodes that may serve this ({', '.join(sorted(demand.nodes))}) is"
    return NoNodeError(f"{subject} usable now", node=demand.node)


def _excluded_by_rules_error(demand: Demand, allowed_names: frozenset[str]) -> NoNodeError:
    """The error for a demand that mesh.yaml keeps away from all nodes, or from the node that the client named."""
    model = "this" if demand.model is None else repr(demand.model)
    hint = f"the nodes that may serve it are: {', '.join(sorted(allowed_names)) or 'none'}"
    if demand.node is None:
        return NoNodeError(f"the rules of mesh.yaml leave no node for {model}", hint=hint)
    return NoNodeError(f"the rules of mesh.yaml keep {model} away from node {demand.node!r}", hint=hint)


def _may_have_model(candidate: Candidate, demand: Demand) -> bool:
    """Whether the node perhaps has the demanded model, and its server perhaps speaks the API of the request. What is
    not known of a node (its models, the kind of its server) counts as suitable."""
    is_kind_known = find_dialect(candidate.kind) is not None
    speaks_api = candidate.kind in demand.kinds or not is_kind_known
    return candidate.enabled and speaks_api and has_model(candidate, demand.model)


def _away_model_error(model: str, away: Sequence[Candidate]) -> NoNodeError:
    """The error for a model that no usable node has, but that the nodes ``away`` have or may have. These nodes cannot
    be used now. This error is not ModelMissing, because a client does not try again after a ModelMissing."""
    listing = [candidate.name for candidate in away if candidate.models is not None]
    if listing:
        return NoNodeError(f"{model!r} is on {', '.join(listing)}, which cannot be used now")
    names = ", ".join(candidate.name for candidate in away)
    return NoNodeError(f"no node that is up has the model {model!r}, and {names} could not be asked for it yet")


def _missing_model_error(
    model: str, usable: Sequence[Candidate], *, wrong_kind: Sequence[Candidate] = ()
) -> ModelMissing:
    """The error for a model that no node has. Its hint names the models of the usable nodes, and a command to pull the
    model. ``wrong_kind``: nodes that have the model, but whose servers do not speak the API of the request."""
    available = _list_models(usable)
    other_nodes_text = ""
    if wrong_kind:
        names = ", ".join(f"{candidate.name} (kind {candidate.kind})" for candidate in wrong_kind)
        other_nodes_text = f"it is on {names}, which cannot serve this API; "
    pull_targets = [candidate.name for candidate in usable if candidate.kind in KINDS_WITH_MODEL_STORE]

    def make_hint(most_models: int, more_models: str, most_targets: int) -> str:
        hint = f"{other_nodes_text}there are: {_join_first(available, most_models, more_models) or 'no models'}"
        if pull_targets:
            command = paste_command("gpumesh models pull {MODEL}", MODEL=model)
            hint += f"; it could be pulled to {_join_first(pull_targets, most_targets, ' …')}: {command}"
        return hint

    return ModelMissing(
        model,
        available=tuple(available),
        hint=make_hint(MAX_SHOWN_MODELS, " …", len(pull_targets)),
        short_hint=make_hint(MAX_HINTED_MODELS, " and others (GET /v1/models)", MAX_HINTED_NODES),
    )


def _join_first(names: Sequence[str], most: int, more: str) -> str:
    """The first ``most`` names, with ``more`` after them if there are others."""
    return ", ".join(names[:most]) + (more if len(names) > most else "")


def _list_models(candidates: Sequence[Candidate]) -> list[str]:
    """The names of the nodes' models, each once, at most ``MAX_LISTED_MODELS``. Up to ``MAX_SHOWN_MODELS`` names are
    sorted. If there are too many names, they are taken from the nodes in turn, so that a node with very many models
    does not push out the models of the other nodes."""
    lists = [sorted(candidate.models or ()) for candidate in candidates]
    names = sorted({name for models in lists for name in models[:MAX_LISTED_MODELS]})
    if len(names) <= MAX_SHOWN_MODELS:
        return names
    rows = zip_longest(*lists)  # the first name of each node, then the second of each …; None where a list has ended
    names_in_turn = dict.fromkeys(name for row in rows for name in row if name is not None)
    return list(islice(names_in_turn, MAX_LISTED_MODELS))
