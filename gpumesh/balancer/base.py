"""The values that the balancer decides on: a ``Demand`` stands for a request, a ``Candidate`` for a node."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import NamedTuple

import msgspec

from gpumesh.balancer.prefixes import PromptPrint
from gpumesh.topology import BackendKind
from gpumesh.topology import Priority as Priority  # noqa: PLC0414 - the users of ``Demand`` import it from here


class ResidencyKey(NamedTuple):
    """The values that must be equal for a server to serve two requests with one load of the model.

    ``model`` is the full name (``model_names.full_name``). ``context`` is the context in tokens (``num_ctx``) that the
    request asks for; ``None``: the server's default. ``options`` are the other options that make a server load the
    model again, as pairs of name and value, sorted by name.
    """

    model: str
    context: int | None = None
    options: tuple[tuple[str, object], ...] = ()


class Demand(msgspec.Struct, frozen=True):
    """The properties of a request that matter for the choice of a node.

    ``model`` is ``None`` for a request that names no model. ``kinds`` are the kinds of server that can answer the
    request. ``node`` is the only node that may answer it, because its client named this node; ``None``: any node may.
    ``nodes`` are the only nodes that may answer it, by the rules of mesh.yaml for its model and its key; ``None``: all
    nodes may. ``preferred_nodes`` are asked first, as nodes of a lower tier are.

    ``prompt_tokens`` is estimated from the size of the request's body; ``None`` if the body is small or not known.
    ``max_tokens`` is the longest answer that the client allows; ``None``: the client sets no maximum.

    ``needs_slot`` is false for a request that costs no inference (``show``, ``pull`` …): such a request neither waits
    for a slot nor takes one. ``session`` names a conversation whose prompt prefix a node may have in its cache. ``id``
    is the client's own name for this request; ``status`` shows it.

    ``residency`` is what the model must be loaded with; ``None`` for a request without a model, or a request that loads
    no model. ``client`` is the name of the client (``ClientNames``), for fairness between clients; empty if it is not
    known. ``route`` is the path of the request's route; empty for a request that came by no route. ``prompt`` are the
    hashed blocks of the prompt (``PromptPrint``); ``None`` if the prompt is not known or too short. ``is_known_route``
    is false for a route that its servers may not have. ``is_whole_text``: the answer is a text that comes in one piece,
    so nobody sees when it begins.
    """

    model: str | None
    kinds: frozenset[BackendKind] = frozenset(BackendKind)
    node: str | None = None
    priority: Priority = Priority.NORMAL
    session: str | int | None = None
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    needs_slot: bool = True
    id: str | None = None
    residency: ResidencyKey | None = None
    client: str = ""
    route: str = ""
    prompt: PromptPrint | None = None
    nodes: frozenset[str] | None = None
    preferred_nodes: frozenset[str] = frozenset()
    is_known_route: bool = True
    is_whole_text: bool = False


class Candidate(msgspec.Struct, frozen=True):
    """A node as ``select.py`` sees it: a snapshot of what decides whether the node can serve a demand.

    ``usable``: tunnel and backend are up, the node is not draining, and its breaker lets a request through. ``models``
    is ``None`` when the backend could not list its models: then any model may be tried. ``broken_models`` are the full
    names of models that the node lists, but that must not be asked for now: the node cannot load them, or answered that
    it does not have them. ``enabled`` is false for a node that mesh.yaml disables.
    """

    name: str
    kind: BackendKind
    usable: bool
    models: AbstractSet[str] | None
    broken_models: AbstractSet[str] = frozenset()
    enabled: bool = True
