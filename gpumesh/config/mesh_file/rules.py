"""The rules between keys of mesh.yaml (such as: a node needs `ssh` or a URL; node names differ). Pure.

The rules read the plain YAML values, even those of the wrong type. So a person sees broken rules and the errors of the
schema together, in one run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from gpumesh.backends.dialects import find_dialect
from gpumesh.config import listen_address
from gpumesh.config.mesh_file import model_rules, pool_rules
from gpumesh.config.mesh_file.error_messages import quote_value
from gpumesh.config.mesh_file.yaml_tree import KeyPath
from gpumesh.config.value_parsers import NAME_PATTERN
from gpumesh.text.addresses import is_loopback

_RECEIVER_KEYS = ("webhook", "webhook_env", "command", "desktop")  # a rule of ``notify`` has one of these receivers
_LOCATION_KEYS = ("port", "url", "urls")  # the keys of a backend that say where the server is

BrokenRule = tuple[KeyPath, str]  # the path of the key, and a message


def find_broken_rules(document: Mapping[str, Any]) -> Iterator[BrokenRule]:
    """Yields the broken rules of a mesh.yaml, each as the path of its key and a message.

    A value of the wrong type breaks no rule, because the schema reports it. There is one exception: for ``nodes`` as a
    mapping instead of a list, the message here shows how to write the list.
    """
    yield from _check_listen(_as_mapping(document.get("gateway")))
    yield from _check_tunnels(document)
    yield from _check_notify(document.get("notify"))
    defaults = _as_mapping(document.get("defaults"))
    yield from _check_one_location(_as_mapping(defaults.get("backend")), ("defaults", "backend"))
    nodes = document.get("nodes")
    if nodes is None or nodes == []:
        yield ("nodes",), "names no node: write at least one, such as `- {name: local, backend: {url: …}}`"
    elif isinstance(nodes, Mapping):  # a person has written the names of the nodes as keys
        usable_names = [name for name in nodes if re.fullmatch(NAME_PATTERN, name)]
        example_name = usable_names[0] if usable_names else "iceland"
        yield ("nodes",), f"nodes are a list: write `- name: {example_name}`"
    elif isinstance(nodes, list):
        yield from _check_nodes(nodes, defaults)
        yield from _check_sections_with_nodes(document, nodes)


def _check_notify(rules: Any) -> Iterator[BrokenRule]:
    """The rules for ``notify``: each of its rules has one receiver, and only a webhook has a format and a token."""
    for index, entry in enumerate(rules if isinstance(rules, list) else ()):
        rule, path = _as_mapping(entry), ("notify", index)
        if not rule:
            continue
        receivers = [key for key in _RECEIVER_KEYS if rule.get(key) is not None]
        if rule.get("desktop") == "false":
            receivers.remove("desktop")
        if not receivers:
            yield path, "says nobody to tell: give one of webhook, webhook_env, command and desktop: true"
        elif len(receivers) > 1:
            yield (*path, receivers[1]), f"{receivers[0]} stands here already: give one of them, and a rule for each"
        elif not receivers[0].startswith("webhook"):
            for key in ("format", "token_env"):
                if rule.get(key) is not None:
                    yield (*path, key), f"is for webhooks, and this rule has {receivers[0]}"


def _check_sections_with_nodes(document: Mapping[str, Any], nodes: list[Any]) -> Iterator[BrokenRule]:
    """The rules for ``pools``, ``models`` and ``gateway``. They may name nodes, and these must exist. For models and
    the gateway's keys, a pool is a node, too."""
    node_names = [_name_or_placeholder(_as_mapping(node).get("name")) for node in nodes]
    yield from pool_rules.check_pools(document.get("pools"), node_names)
    node_names += pool_rules.pool_names(document.get("pools"))
    gateway = _as_mapping(document.get("gateway"))
    yield from model_rules.check_models(_as_mapping(document.get("models")), node_names)
    yield from model_rules.check_keys(gateway.get("keys"), gateway.get("api_key_env"), node_names)
    yield from model_rules.check_route_priority(gateway.get("route_priority"))
    yield from model_rules.check_heartbeat(gateway.get("heartbeat"))


def _name_or_placeholder(name: Any) -> str:
    """Returns the name of a node; a question mark if the node has none that can be read."""
    return name if isinstance(name, str) else "?"


def _check_nodes(nodes: list[Any], defaults: Mapping[str, Any]) -> Iterator[BrokenRule]:
    """The rules for the list ``nodes``: no two nodes have the same name, and the rules for each node."""
    first_index_of: dict[str, int] = {}
    for index, entry in enumerate(nodes):
        node = _as_mapping(entry)
        name = node.get("name")
        if isinstance(name, str):
            first_index = first_index_of.setdefault(name, index)
            if first_index != index:
                yield ("nodes", index, "name"), f"{quote_value(name)} is the name of nodes[{first_index}] already"
        if node:  # not empty, and a mapping
            yield from _check_node(node, defaults, ("nodes", index))


def _check_listen(gateway: Mapping[str, Any]) -> Iterator[BrokenRule]:
    """The rules for ``gateway.listen``: at most one HOST:PORT and one unix:PATH; an API key beyond loopback."""
    listen = gateway.get("listen")
    path: KeyPath = ("gateway", "listen")
    if listen == []:
        yield path, "names no address"
    entries: list[tuple[KeyPath, Any]] = [(path, listen)]
    if isinstance(listen, list):
        entries = [((*path, index), entry) for index, entry in enumerate(listen)]
    first_entry_of: dict[str, str] = {}  # by the kind of address
    for entry_path, entry in entries:
        address = _parse_listen_entry(entry)
        if address is None:
            continue
        kind = "unix:PATH" if isinstance(address, str) else "HOST:PORT"
        if kind in first_entry_of:
            first_entry = quote_value(first_entry_of[kind])
            yield entry_path, f"{first_entry} stands here already: give one HOST:PORT, one unix:PATH, or both"
        else:
            first_entry_of[kind] = entry
        asks_for_key = gateway.get("api_key_env") is not None or bool(gateway.get("keys"))
        if isinstance(address, tuple) and not asks_for_key:
            host, _ = address
            if not is_loopback(host):
                message = f"listening on {host} {listen_address.OPEN_LISTEN_MESSAGE}; {listen_address.OPEN_LISTEN_HINT}"
                yield entry_path, message


def _parse_listen_entry(entry: Any) -> tuple[str, int] | str | None:
    """Returns the host and the port, or the path of a Unix socket; ``None`` for a wrong entry, which the schema
    reports."""
    if not isinstance(entry, str):
        return None
    try:
        return listen_address.parse_listen_entry(entry)
    except ValueError:  # the schema reports it
        return None


def _check_tunnels(document: Mapping[str, Any]) -> Iterator[BrokenRule]:
    """The rule for ``tunnels``: Unix sockets cannot be shared."""
    tunnels = _as_mapping(document.get("tunnels"))
    is_shared = str(tunnels.get("share")).lower() == "true"  # all values of the file are text still
    if tunnels.get("listen") == "unix" and is_shared:
        yield ("tunnels", "share"), "cannot hold for Unix sockets, which are your own user's: leave out one of the two"


def _check_one_location(backend: Mapping[str, Any], path: KeyPath) -> Iterator[BrokenRule]:
    """The rules for the section ``backend``, which stands at ``path``: at most one location, and no empty ``urls``."""
    location_keys = [key for key in _keys_with_value(backend) if key in _LOCATION_KEYS]
    if len(location_keys) > 1:
        first_key, second_key, *_ = location_keys
        yield (*path, second_key), f"{first_key} stands here already: give one of port, url and urls"
    if backend.get("urls") == []:
        yield (*path, "urls"), "names no URL"


def _check_node(node: Mapping[str, Any], defaults: Mapping[str, Any], path: KeyPath) -> Iterator[BrokenRule]:
    """The rules for one node: it says how to reach its host, and where its server is."""
    backend = _as_mapping(node.get("backend"))
    default_backend = _as_mapping(defaults.get("backend"))
    yield from _check_one_location(backend, (*path, "backend"))
    location_key = _find_location_key(backend) or _find_location_key(default_backend)
    is_direct = node.get("ssh") is None and node.get("address_from") is None
    if is_direct:
        if location_key == "port":
            key_path = (*path, "backend", "port") if "port" in backend else path  # ``defaults`` may give the port
            yield key_path, "a port is meant as seen from an ssh host: without `ssh`, write `url: http://127.0.0.1:…`"
        elif location_key is None:
            yield path, "has neither `ssh` nor a URL: say how to reach it, by `ssh: {host: …}` or `backend: {url: …}`"
        return
    if not _names_host(node, _as_mapping(defaults.get("ssh"))):
        yield (*path, "ssh"), "does not say which host: give `host`, `alias` or the node's `address_from`"
    kind = backend.get("kind") or default_backend.get("kind")
    dialect = find_dialect(kind) if isinstance(kind, str) else None
    has_no_usual_port = dialect is not None and dialect.usual_port is None
    if location_key is None and has_no_usual_port:
        yield (*path, "backend"), f"servers of kind {kind} have no usual port: give `port` or `url`"


def _find_location_key(backend: Mapping[str, Any]) -> str | None:
    """Returns the first of the keys port, url and urls that has a value in the section; ``None`` if no key has."""
    keys_with_value = _keys_with_value(backend)
    return next((key for key in _LOCATION_KEYS if key in keys_with_value), None)


def _names_host(node: Mapping[str, Any], default_ssh: Mapping[str, Any]) -> bool:
    """Whether the node says which host it is, itself or by a default. An ``ssh`` of the wrong type counts: the schema
    reports it."""
    ssh = node.get("ssh")
    if node.get("address_from") is not None or not isinstance(ssh, Mapping):
        return True
    keys_with_value = _keys_with_value(ssh) + _keys_with_value(default_ssh)
    return "host" in keys_with_value or "alias" in keys_with_value


def _keys_with_value(section: Mapping[str, Any]) -> list[str]:
    """Returns the keys of the section, in the order of the file, without those that have no value (null)."""
    return [key for key, value in section.items() if value is not None]


def _as_mapping(value: Any) -> Mapping[str, Any]:
    """Returns a mapping as it is, and an empty mapping for a value of any other type."""
    return value if isinstance(value, Mapping) else {}
