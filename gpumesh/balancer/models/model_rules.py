"""``ModelRules``: what mesh.yaml says of models (``models:``), as the balancer and the gateway ask for it. Pure.

A model with aliases has one name in the mesh, its key in mesh.yaml. Demands, candidates and all that is learned use
this name only. Each server gets the name under which it lists the model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from gpumesh.balancer.base import Demand
from gpumesh.text.model_names import full_name
from gpumesh.topology import ModelSpec


class ModelRules:
    """The rules of one mesh.yaml."""

    def __init__(self, specs: Iterable[ModelSpec] = ()) -> None:
        self.replace(specs)

    def replace(self, specs: Iterable[ModelSpec]) -> None:
        """Takes over other rules, for all later questions."""
        self.specs = tuple(specs)
        self._spec_by_name = {full_name(name): spec for spec in self.specs for name in (spec.name, *spec.aliases)}

    def __repr__(self) -> str:
        return f"<ModelRules {len(self.specs)} models>"

    @property
    def has_aliases(self) -> bool:
        """Whether any model has aliases."""
        return any(spec.aliases for spec in self.specs)

    @property
    def pinned(self) -> frozenset[str]:
        """The full names of the models that must not be pushed out of a node's memory."""
        return frozenset(full_name(spec.name) for spec in self.specs if spec.pinned)

    def find(self, model: str | None) -> ModelSpec | None:
        """The rules for a model, by its name or by an alias; ``None`` if mesh.yaml has none."""
        # Most mesh.yaml files have no rules. Then a request costs one test only.
        if not self._spec_by_name or model is None:
            return None
        return self._spec_by_name.get(full_name(model))

    def name_in_mesh(self, model: str) -> str:
        """The name that the mesh uses for a model: for an alias the name of its model, else the name as it is."""
        spec = self.find(model)
        return model if spec is None else spec.name

    def identity(self, model: str) -> str:
        """The text by which two names of one model are recognised: it is the same for its aliases and spellings."""
        return full_name(self.name_in_mesh(model))

    def has_other_name(self, name: str, model: str) -> bool:
        """Whether the body of a request that names ``name`` must be rewritten to ask for ``model``: the two are
        different models, or mesh.yaml spells the name in another way, or ``model`` has aliases. A new body begins with
        the model's name, so that it is easy to replace it by the name under which a server lists the model."""
        if name == model and not self.specs:  # nearly every request
            return False
        spec = self.find(model)
        is_respelled = spec is not None and (bool(spec.aliases) or name != model)
        return is_respelled or full_name(name) != full_name(model)

    def apply(self, demand: Demand) -> Demand:
        """The demand with the name that the mesh uses for its model, and with the nodes that may serve it. Applying the
        rules twice changes nothing more."""
        spec = self.find(demand.model)
        if spec is None:
            return demand
        nodes = demand.nodes
        if spec.nodes is not None:
            nodes = frozenset(spec.nodes) if nodes is None else nodes.intersection(spec.nodes)
        return replace(demand, model=spec.name, nodes=nodes, preferred_nodes=frozenset(spec.prefer))

    def fallbacks(self, model: str | None) -> list[str]:
        """The models that serve a request if no node can serve ``model``: first its fallback, then the fallback of
        that, and so on. Each is named once, even if the fallbacks form a circle."""
        names: list[str] = []
        spec = self.find(model)
        seen = set() if model is None else {self.identity(model)}
        while spec is not None and spec.fallback is not None:
            name = self.name_in_mesh(spec.fallback)
            if self.identity(name) in seen:
                break
            seen.add(self.identity(name))
            names.append(name)
            spec = self.find(name)
        return names

    def plan_models(self, demand: Demand) -> list[Demand]:
        """The demands that are tried for a request, in order: with the demanded model, then with each of its fallbacks.
        Each has the nodes that may serve its model, and its context is rounded (``round_context``)."""
        if demand.model is None or self.find(demand.model) is None:
            return [demand]
        return [self.demand_for(demand, model) for model in (demand.model, *self.fallbacks(demand.model))]

    def demand_for(self, demand: Demand, model: str) -> Demand:
        """The demand with this model (the demanded one or a fallback), the nodes that may serve it, and its rounded
        context. ``demand`` is what the client asks for, before any rule."""
        name, residency = self.name_in_mesh(model), demand.residency
        if residency is not None:
            context = residency.context
            if context is not None:
                context = self.round_context(name, context)
            residency = residency._replace(model=full_name(name), context=context)
        return self.apply(replace(demand, model=name, residency=residency))

    # -- the names that servers use ------------------------------------------------------------------------------

    def server_names(self, listed_names: Iterable[str]) -> Mapping[str, str]:
        """For each model with aliases that a server lists: by its name in the mesh, the name that requests to this
        server use. If the server lists several names of the model, the first of them in mesh.yaml is used."""
        listed: dict[str, str] = {}
        for name in listed_names:
            listed.setdefault(full_name(name), name)
        chosen_names: dict[str, str] = {}
        for spec in self.specs:
            if not spec.aliases:
                continue
            names = [listed[full_name(name)] for name in (spec.name, *spec.aliases) if full_name(name) in listed]
            if names:
                chosen_names[spec.name] = names[0]
        return chosen_names

    def round_context(self, model: str, context: int) -> int:
        """The context in tokens that a server gets for a request that asks for ``context`` tokens: the next step of the
        model. A context beyond the last step is left as it is."""
        spec = self.find(model)
        if spec is None or not spec.context_steps:
            return context
        index = bisect_left(spec.context_steps, context)
        return spec.context_steps[index] if index < len(spec.context_steps) else context
