"""The rules of mesh.yaml for ``models``, and for the keys and routes of ``gateway``: names that must exist. Pure.

As in ``rules``, a value of the wrong type breaks no rule here: the schema reports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpumesh.config.mesh_file.error_messages import did_you_mean, quote_value
from gpumesh.config.mesh_file.yaml_tree import KeyPath
from gpumesh.text.model_names import full_name
from gpumesh.topology import HEARTBEAT_S

ALL_NODES = "all"
# The routes whose requests wait for a slot: a class has a meaning only for these.
QUEUED_ROUTES = (
    "/api/chat",
    "/api/generate",
    "/api/embed",
    "/api/embeddings",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/audio/transcriptions",
)

BrokenRule = tuple[KeyPath, str]  # the path of the key, and a message


def check_models(models: Mapping[str, Any], node_names: Sequence[str]) -> Iterator[BrokenRule]:
    """Yields the broken rules of ``models``. ``node_names`` are the nodes of the mesh."""
    yield from _check_names(models)
    for name, value in models.items():
        if not isinstance(value, Mapping):
            continue
        path = ("models", name)
        nodes = value.get("nodes")
        allows_all = nodes is None or nodes == ALL_NODES
        if not allows_all:
            # A single name counts as a list of one, also in the path of a broken rule.
            nodes = [nodes] if isinstance(nodes, str) else nodes
            yield from check_node_names(nodes, node_names, (*path, "nodes"))
        allowed_names = node_names if allows_all else _texts(nodes)
        yield from _check_preferred(value.get("prefer"), node_names, allowed_names, (*path, "prefer"))
        yield from _check_copies(value.get("copies"), len(set(allowed_names)), (*path, "copies"))
        yield from _check_context_steps(value.get("context_steps"), (*path, "context_steps"))
        if value.get("aliases") == []:
            yield (*path, "aliases"), "names no model"
    yield from _check_fallbacks(models)


def _check_names(models: Mapping[str, Any]) -> Iterator[BrokenRule]:
    """Yields each name, of a model or an alias, that means the same model as an earlier name does.

    ``llama3`` and ``LLAMA3:latest``, for example: both have the full name ``llama3:latest``.
    """
    model_by_name: dict[str, str] = {}  # each model's name as in the file, by its full name
    for name in models:
        earlier = model_by_name.setdefault(full_name(name), name)
        if earlier != name:
            yield ("models", name), f"is the same model as {quote_value(earlier)}"
    model_by_alias: dict[str, str] = {}  # by the full name of the alias
    for name, value in models.items():
        for path, alias in entries(_aliases(value), ("models", name, "aliases")):
            full_alias = full_name(alias)
            if full_alias in model_by_alias:
                yield path, f"{quote_value(alias)} is an alias of {model_by_alias[full_alias]} already"
            elif model_by_name.get(full_alias) == name:
                yield path, f"{quote_value(alias)} is the model's own name"
            elif full_alias in model_by_name:
                yield path, f"{quote_value(alias)} is another model of this file"
            model_by_alias.setdefault(full_alias, name)


def _aliases(model: Any) -> Any:
    """The aliases in the section of a model, of whatever type; ``None`` if it has none."""
    return model.get("aliases") if isinstance(model, Mapping) else None


def check_node_names(nodes: Any, node_names: Sequence[str], path: KeyPath) -> Iterator[BrokenRule]:
    """Yields what is wrong in a list of nodes: it must name at least one, and only nodes of the mesh, each once."""
    if nodes == []:
        yield path, "names no node: leave it out if any node may be used"
    seen: set[str] = set()
    for entry_path, name in entries(nodes, path):
        if name not in node_names:
            yield entry_path, _unknown_node(name, node_names)
        elif name in seen:
            yield entry_path, f"{quote_value(name)} stands here already"
        seen.add(name)


def _unknown_node(name: str, node_names: Sequence[str]) -> str:
    """The message for a name that is no node of the mesh, where ``all`` alone may stand too."""
    return "all stands alone, as `nodes: all`" if name == ALL_NODES else describe_unknown_node(name, node_names)


def describe_unknown_node(name: str, node_names: Sequence[str]) -> str:
    """The message for a name that is no node of the mesh."""
    guess = did_you_mean(name, node_names)
    if guess is not None:
        return f"there is no node {quote_value(name)}; did you mean {guess}?"
    return f"there is no node {quote_value(name)}; the nodes are: {', '.join(node_names)[:300] or 'none'}"


def _check_preferred(
    prefer: Any, node_names: Sequence[str], allowed_names: Sequence[str], path: KeyPath
) -> Iterator[BrokenRule]:
    """``prefer`` names nodes of the mesh that may serve the model."""
    yield from check_node_names(prefer, node_names, path)
    for entry_path, name in entries(prefer, path):
        if name in node_names and name not in allowed_names:
            yield entry_path, f"{quote_value(name)} is none of the model's nodes"


def _check_copies(copies: Any, node_count: int, path: KeyPath) -> Iterator[BrokenRule]:
    """Yields a number of copies that is greater than the number of nodes that the model may use."""
    is_number = isinstance(copies, str) and copies.isdecimal() and len(copies) < 10  # otherwise the schema reports it
    # Without any node, another rule is broken already.
    if is_number and node_count > 0 and int(copies) > node_count:
        nodes = "node" if node_count == 1 else "nodes"
        yield path, f"{copies} copies need as many nodes, and the model may use {node_count} {nodes}"


def _check_context_steps(steps: Any, path: KeyPath) -> Iterator[BrokenRule]:
    """Yields each step that is not greater than the step before, and an empty list."""
    if steps == []:
        yield path, "names no context: leave it out if contexts are not to be changed"
    previous: int | None = None
    for entry_path, text in entries(steps, path):
        if not text.isdecimal() or len(text) > 18:  # the schema reports it
            continue
        if previous is not None and int(text) <= previous:
            yield entry_path, f"{text} does not rise: it follows {previous}"
        previous = int(text)


def _check_fallbacks(models: Mapping[str, Any]) -> Iterator[BrokenRule]:
    """Yields each circle of fallbacks: models that fall back to themselves, directly or by way of others."""
    model_by_name: dict[str, str] = {}  # each model's name as in the file, by its full name and those of its aliases
    for name in models:
        model_by_name.setdefault(full_name(name), name)
    for name, value in models.items():
        for alias in _texts(_aliases(value)):
            model_by_name.setdefault(full_name(alias), name)
    fallback_of: dict[str, str] = {}  # without fallbacks that have no section here: no circle goes on from them
    for name, value in models.items():
        fallback = value.get("fallback") if isinstance(value, Mapping) else None
        if isinstance(fallback, str) and full_name(fallback) in model_by_name:
            fallback_of[name] = model_by_name[full_name(fallback)]
    checked: set[str] = set()  # the models of all earlier chains, so that each circle is reported once
    for start in models:
        chain: dict[str, None] = {}  # a set in order
        model: str | None = start
        while model is not None and model not in checked and model not in chain:
            chain[model] = None
            model = fallback_of.get(model)
        if model is not None and model in chain:  # the chain has come back to itself
            names = list(chain)
            yield _circle_of_fallbacks(names[names.index(model) :])
        checked.update(chain)


def _circle_of_fallbacks(circle: list[str]) -> BrokenRule:
    """The broken rule for models of which each falls back to the next, and the last to the first."""
    first = circle[0]
    path = ("models", first, "fallback")
    if len(circle) == 1:
        return path, "is the model itself"
    return path, f"falls back in a circle: {' → '.join([*circle, first])[:300]}"


def check_keys(keys: Any, api_key_env: Any, node_names: Sequence[str]) -> Iterator[BrokenRule]:
    """Yields the broken rules of ``gateway.keys``. ``api_key_env`` is the variable of the gateway's own key."""
    path: KeyPath = ("gateway", "keys")
    if keys == []:
        yield path, "names no key"
    if not isinstance(keys, list):
        return
    first_use: dict[tuple[str, str], str] = {}  # the first place of each value, by the member (``name``) and the value
    if isinstance(api_key_env, str):
        first_use["env", api_key_env] = "gateway.api_key_env"
    for index, key in enumerate(keys):
        if not isinstance(key, Mapping):
            continue
        for member in ("name", "env", "file", "hash"):
            text = key.get(member)
            if not isinstance(text, str):
                continue
            place = f"gateway.keys[{index}]"
            compared = text.lower() if member == "hash" else text  # hexadecimal digits: ``AB`` is ``ab``
            earlier = first_use.setdefault((member, compared), place)
            if earlier != place:
                yield (*path, index, member), f"is that of {earlier} already"
        sources = [member for member in ("env", "file", "hash") if key.get(member) is not None]
        if not sources:
            yield (
                (*path, index),
                "says neither `env`, `file` nor `hash`: give the variable or file with the key, or its SHA-256",
            )
        elif len(sources) > 1:
            yield (*path, index, sources[1]), f"{sources[0]} stands here already: give one of env, file and hash"
        yield from check_node_names(key.get("nodes"), node_names, (*path, index, "nodes"))
        if key.get("models") == []:
            yield (*path, index, "models"), "names no model: leave it out if all models may be used"


def check_route_priority(routes: Any) -> Iterator[BrokenRule]:
    """Yields each route of ``gateway.route_priority`` whose requests do not wait for a slot."""
    if not isinstance(routes, Mapping):
        return
    for route in routes:
        if route not in QUEUED_ROUTES:
            guess = did_you_mean(route, QUEUED_ROUTES)
            end = f"; did you mean {guess}?" if guess is not None else f"; there are: {', '.join(QUEUED_ROUTES)}"
            yield ("gateway", "route_priority", route), f"is no route whose requests wait{end}"


def check_heartbeat(routes: Any) -> Iterator[BrokenRule]:
    """Yields each route of ``gateway.heartbeat`` whose streams cannot have one."""
    if not isinstance(routes, Mapping):
        return
    for route in routes:
        if route not in HEARTBEAT_S:
            guess = did_you_mean(route, tuple(HEARTBEAT_S))
            end = f"; did you mean {guess}?" if guess is not None else f"; there are: {', '.join(HEARTBEAT_S)}"
            yield ("gateway", "heartbeat", route), f"is no route whose answers can have a heartbeat{end}"


def entries(value: Any, path: KeyPath) -> list[tuple[KeyPath, str]]:
    """The texts of a list, each with its path. A single text counts as a list of one; any other value has no texts."""
    if isinstance(value, str):
        return [(path, value)]
    if not isinstance(value, list):
        return []
    return [((*path, index), entry) for index, entry in enumerate(value) if isinstance(entry, str)]


def _texts(value: Any) -> list[str]:
    """The same texts without their paths."""
    return [text for _, text in entries(value, ())]
