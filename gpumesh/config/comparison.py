"""Compares what a running mesh has read from mesh.yaml with what the file says now, key by key. Pure.

The keys are those of the file (``ssh.port``), also where the spec has other names for them. A value that stands under
``defaults`` counts for each node that it is merged into.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from gpumesh.config.value_parsers import format_duration, format_size
from gpumesh.errors import ConfigError, GPUMeshError
from gpumesh.pool_spec import PoolMember, PoolSpec
from gpumesh.state import Finding, Severity
from gpumesh.text.addresses import format_address
from gpumesh.topology import GatewaySpec, ModelSpec, NodeSpec, ReloadMode, Target, Topology
from gpumesh.wire import to_json

APPLY_HINT = "`gpumesh reload` lets the running mesh take it over"
AUTO_HINT = "the running mesh takes it over within a few seconds"
RESTART_HINT = "`gpumesh down`, then `gpumesh up -d`"
BAD_FILE_HINT = "`gpumesh config check` says all that is wrong with it"

# The first words of a node's keys that decide which host and server are reached, and how.
_ROUTE_SECTIONS = frozenset({"ssh", "backend", "enabled", "address_from"})
_EXPECTATION_SECTIONS = frozenset({"expect"})
# The keys of a file whose names differ from those of the spec. Two fields may be one key.
_KEYS_IN_FILE = {
    "ssh.identity_files": "ssh.identity_file",
    "ssh.connect_timeout_s": "ssh.connect_timeout",
    "ssh.keepalive_s": "ssh.keepalive",
    "ssh.address_from": "address_from",
    "ssh.more_known_hosts": "ssh.known_hosts",
    "ssh.jump_aliases": "ssh.proxy_jump",
    "ssh.keys_of_alias": "ssh.alias",
    "backend.targets": "backend.urls",
    "gateway.timeout_s": "gateway.timeout",
    "gateway.heartbeat_s": "gateway.heartbeat",
    "wanted_copies": "copies",
    "members": "nodes",
}
# The fields of a topology that are compared key by key, and the path of the file.
_SECTIONS_WITH_KEYS = frozenset({"nodes", "models", "pools", "gateway", "tunnels", "redis", "source"})
_SECONDS = ("ssh.connect_timeout", "ssh.keepalive", "gateway.timeout")
# A command may hold a secret, and the text of the others says little.
_HIDDEN_VALUES = frozenset({"address_from", "gateway.keys", "gateway.heartbeat", "gateway.route_priority"})
_MAX_VALUE_CHARS = 60  # a longer value is not shown
_GIVEN = "given"  # the value of a section that is there


@dataclass(frozen=True, slots=True)
class ConfigSnapshot:
    """What mesh.yaml said when a mesh read it. ``digest`` is the SHA-256 of the file's bytes then, in hexadecimal;
    ``None``: the mesh was not made from a file; empty: there was no file that said exactly this, because a part of the
    file takes effect after a restart. ``pool_nodes`` are the nodes of the pools that run now."""

    topology: Topology
    digest: str | None = None
    pool_nodes: tuple[NodeSpec, ...] = ()

    @property
    def running_topology(self) -> Topology:
        """The topology with all nodes that the mesh has now, those of its pools too."""
        return replace(self.topology, nodes=(*self.topology.nodes, *self.pool_nodes))


@dataclass(frozen=True, slots=True)
class KeyChange:
    """A key of mesh.yaml whose value differs. ``before`` and ``after`` are its values for people; ``None``: the key has
    no value there, or the value is not shown."""

    key: str
    before: str | None = None
    after: str | None = None

    def __str__(self) -> str:
        """``ssh.port 22 -> 2222``; the key alone if no value is shown."""
        if self.before is None and self.after is None:
            return self.key
        return f"{self.key} {self.before or 'not set'} -> {self.after or 'not set'}"


@dataclass(frozen=True, slots=True)
class NamedChange:
    """A node, a model or a pool that is in both topologies, and its keys that differ."""

    name: str
    keys: tuple[KeyChange, ...]

    @property
    def sections(self) -> tuple[str, ...]:
        """The first words of the keys (``ssh``, ``backend``), each once."""
        return tuple(dict.fromkeys(change.key.partition(".")[0] for change in self.keys))

    def __str__(self) -> str:
        return f"{self.name}: {_list_keys(self.keys)}"


@dataclass(frozen=True, slots=True)
class Differences:
    """What is different in the file now. ``added`` are the nodes that only the file has, ``removed`` the nodes that
    only the running mesh has, and ``changed`` those that both have. The same for models and pools. ``mesh_keys`` are
    the keys outside of ``nodes``, ``models`` and ``pools``."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[NamedChange, ...] = ()
    models_added: tuple[str, ...] = ()
    models_removed: tuple[str, ...] = ()
    models_changed: tuple[NamedChange, ...] = ()
    mesh_keys: tuple[KeyChange, ...] = ()
    pools_added: tuple[str, ...] = ()
    pools_removed: tuple[str, ...] = ()
    pools_changed: tuple[NamedChange, ...] = ()

    @property
    def change_routes(self) -> bool:
        """Whether the file leads to other hosts or servers than those that the running mesh has reached."""
        other_routes = any(_ROUTE_SECTIONS.intersection(node.sections) for node in self.changed)
        other_local_ends = any(change.key.startswith("tunnels.") for change in self.mesh_keys)
        return bool(self.added or self.removed) or other_routes or other_local_ends

    @property
    def change_models(self) -> bool:
        return bool(self.models_added or self.models_removed or self.models_changed)

    @property
    def change_pools(self) -> bool:
        return bool(self.pools_added or self.pools_removed or self.pools_changed)

    @property
    def change_expectations_only(self) -> bool:
        """Whether the mesh would run as it does now: only what `audit` expects of its nodes has changed."""
        is_elsewhere = self.added or self.removed or self.mesh_keys or self.change_models or self.change_pools
        return not is_elsewhere and all(_EXPECTATION_SECTIONS.issuperset(node.sections) for node in self.changed)

    def __bool__(self) -> bool:
        return bool(
            self.added or self.removed or self.changed or self.change_models or self.change_pools or self.mesh_keys
        )

    def __str__(self) -> str:
        """The differences as a list for a sentence, without values."""
        parts = [f"{name} is not in the running mesh" for name in self.added]
        parts += [f"{name} is not in mesh.yaml any more" for name in self.removed]
        parts += [f"{node.name} has another {_join_and(change.key for change in node.keys)}" for node in self.changed]
        parts += [f"rules for the model {name}" for name in self.models_added]
        parts += [f"no rules for the model {name} any more" for name in self.models_removed]
        parts += [
            f"the model {model.name} has another {_join_and(change.key for change in model.keys)}"
            for model in self.models_changed
        ]
        parts += [f"the pool {name} is new" for name in self.pools_added]
        parts += [f"the pool {name} is not in mesh.yaml any more" for name in self.pools_removed]
        parts += [
            f"the pool {pool.name} has another {_join_and(change.key for change in pool.keys)}"
            for pool in self.pools_changed
        ]
        parts += [f"another {change.key}" for change in self.mesh_keys]
        return "; ".join(parts)


def compare_topologies(running: Topology, current: Topology) -> Differences:
    """The differences of ``current``, which the file says now, from ``running``. Pure. The order of nodes, comments and
    the file's path do not count."""
    nodes = _compare_named({node.name: node for node in running.nodes}, {node.name: node for node in current.nodes})
    models = _compare_named(
        {model.name: model for model in running.models}, {model.name: model for model in current.models}
    )
    pools_added, pools_removed, pools_changed = _compare_named(
        {pool.name: pool for pool in running.pools}, {pool.name: pool for pool in current.pools}
    )
    mesh_keys = tuple(_find_changes(_mesh_values(running), _mesh_values(current)))
    return Differences(
        *nodes,
        *models,
        mesh_keys=mesh_keys,
        pools_added=pools_added,
        pools_removed=pools_removed,
        pools_changed=pools_changed,
    )


def _compare_named(
    running: Mapping[str, NodeSpec | ModelSpec | PoolSpec], current: Mapping[str, NodeSpec | ModelSpec | PoolSpec]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[NamedChange, ...]]:
    """The names that are only in ``current``, those that are only in ``running``, and the changes of the others."""
    changed = []
    for name, spec in current.items():
        if name in running:
            changes = tuple(_find_changes(_values_of(running[name]), _values_of(spec)))
            if changes:
                changed.append(NamedChange(name, changes))
    added = tuple(name for name in current if name not in running)
    removed = tuple(name for name in running if name not in current)
    return added, removed, tuple(changed)


def _find_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[KeyChange]:
    """The keys whose values differ. Values are compared in the form in which a running mesh sends them (JSON), so that
    a tuple equals a list."""
    for key in dict.fromkeys((*before, *after)):
        section = key.partition(".")[0]
        if section != key and before.get(section) != after.get(section):
            continue  # a node that gets its first section `ssh` has one change, and not one for each key in it
        old, new = before.get(key), after.get(key)
        if to_json(old) != to_json(new):
            yield KeyChange(key, _show(key, old), _show(key, new))


def _mesh_values(topology: Topology) -> Mapping[str, Any]:
    """The values outside of ``nodes``, ``models`` and ``pools``, by their keys in the file. A section that is not named
    here is compared as a whole."""
    gateway = topology.gateway
    others = {field.name: getattr(topology, field.name) for field in fields(topology)}
    return {
        **{name: value for name, value in others.items() if name not in _SECTIONS_WITH_KEYS},
        "gateway.listen": _describe_listen(gateway),
        **{
            key: value
            for key, value in _values_of(gateway, "gateway.").items()
            if key not in ("gateway.host", "gateway.port", "gateway.socket")
        },
        **_values_of(topology.tunnels, "tunnels."),
        **({} if topology.redis is None else {"redis": _GIVEN, **_values_of(topology.redis, "redis.")}),
    }


def _describe_listen(gateway: GatewaySpec) -> list[str]:
    addresses = [] if gateway.host is None else [format_address(gateway.host, gateway.port)]
    return addresses if gateway.socket is None else [*addresses, f"unix:{gateway.socket}"]


def _values_of(spec: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a spec by their keys in the file. Two fields with one key give a list of both."""
    values: dict[str, Any] = {}
    for field in fields(spec):
        value = getattr(spec, field.name)
        key = _KEYS_IN_FILE.get(f"{prefix}{field.name}", f"{prefix}{field.name}")
        if key == "name" and not prefix:
            continue  # of a node, a model or a pool: it is what tells them apart
        if key == "labels":
            values.update({f"labels.{name}": text for name, text in value.items()})
        elif is_dataclass(value) and not isinstance(value, Target) and key != "address_from":
            values.update({key: _GIVEN, **_values_of(value, f"{key}.")})
        else:
            values[key] = value if key not in values else [values[key], value]
    return values


def _show(key: str, value: Any) -> str | None:
    """The value for people; ``None`` if there is none, or if it is not shown."""
    if value is None or key in _HIDDEN_VALUES:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Target):
        return value.url
    if isinstance(value, PoolMember):
        return value.node if value.memory_mib is None else f"{value.node} ({format_size(value.memory_mib)})"
    if is_dataclass(value) or isinstance(value, Mapping):  # a webhook of ``notify`` may hold a secret
        return None
    if key in _SECONDS:
        return format_duration(value)
    if isinstance(value, list | tuple):
        texts = [_show(key, member) for member in value]
        text = ", ".join(text for text in texts if text)
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if text and len(text) <= _MAX_VALUE_CHARS else None


def _list_keys(changes: Iterable[KeyChange]) -> str:
    return ", ".join(map(str, changes))


def _join_and(names: Iterable[str]) -> str:
    return " and ".join(names)


# -- what it means ---------------------------------------------------------------------------------------------------


def describe_differences(
    differences: Differences,
    mode: ReloadMode = ReloadMode.MANUAL,
    after_restart: tuple[KeyChange, ...] = (),
) -> Finding | None:
    """The finding about a file that is not what runs; ``None`` if there is no difference. A remark if the mesh would
    run as it does now, else a warning. ``mode``: whether the running mesh takes changes over by itself.
    ``after_restart``: the changes that it cannot take over (``live_changes.py``)."""
    if not differences:
        return None
    severity = Severity.INFO if differences.change_expectations_only else Severity.WARNING
    hint = AUTO_HINT if mode is ReloadMode.AUTO else APPLY_HINT
    if after_restart:
        names = _join_and(change.key for change in after_restart)
        is_all = differences == Differences(mesh_keys=after_restart)
        restart_hint = f"{names} only after a restart: {RESTART_HINT}"
        hint = restart_hint if is_all else f"{hint}; {restart_hint}"
    message = f"mesh.yaml was changed after the running mesh had read it: {differences}"
    return Finding("config-changed", severity, None, message, hint)


def describe_bad_file(error: GPUMeshError) -> Finding:
    """The finding about a file that cannot be used. The message has the first problem, with its line and column."""
    first_problem, *others = error.message.splitlines() or [""]
    more = f" (and {len(others)} more)" if others else ""
    message = f"mesh.yaml cannot be used now, and the mesh runs on as the file was: {first_problem}{more}"
    hint = BAD_FILE_HINT if isinstance(error, ConfigError) else error.hint
    return Finding("config-invalid", Severity.WARNING, None, message, hint)
