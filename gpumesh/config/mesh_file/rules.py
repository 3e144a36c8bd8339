"""The rules between keys of mesh.yaml. Pure.

The rules read the plain YAML values, even those of the wrong type. So a person sees broken rules and the errors of the
schema together, in one run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from gpumesh.addresses import is_loopback
from gpumesh.backends.dialects import find_dialect
from gpumesh.config import listen_address
from gpumesh.config.mesh_file.error_messages import quote_value
from gpumesh.config.mesh_file.yaml_tree import KeyPath
from gpumesh.config.value_parsers import NAME_PATTERN

_LOCATION_KEYS = ("port", "url", "urls")

BrokenRule = tuple[KeyPath, str]


def find_broken_rules(document: Mapping[str, Any]) -> Iterator[BrokenRule]:
    """The broken rules, each as the path of its key and a message."""
    yield from _check_gateway(document)
    yield from _check_tunnels(document)
    defaults = _as_mapping(document.get("defaults"))
    yield from _check_one_location(_as_mapping(defaults.get("backend")), ("defaults", "backend"))
    nodes = document.get("nodes")
    if nodes is None or nodes == []:
        yield ("nodes",), "names no node: write at least one, such as `- {name: local, backend: {url: …}}`"
    elif isinstance(nodes, Mapping):
        example_name = next((name for name in nodes if re.fullmatch(NAME_PATTERN, name)), "iceland")
        yield ("nodes",), f"nodes are a list: write `- name: {example_name}`"
    elif isinstance(nodes, list):
        yield from _check_nodes(nodes, defaults)


def _check_nodes(nodes: list[Any], defaults: Mapping[str, Any]) -> Iterator[BrokenRule]:
    first_index_of: dict[str, int] = {}
    for index, entry in enumerate(nodes):
        node = _as_mapping(entry)
        name = node.get("name")
        if isinstance(name, str):
            first_index = first_index_of.setdefault(name, index)
            if first_index != index:
                yield ("nodes", index, "name"), f"{quote_value(name)} is the name of nodes[{first_index}] already"
        if node:
            yield from _check_node(node, defaults, ("nodes", index))


def _check_gateway(document: Mapping[str, Any]) -> Iterator[BrokenRule]:
    gateway = _as_mapping(document.get("gateway"))
    listen = gateway.get("listen")
    if listen == []:
        yield ("gateway", "listen"), "names no address"
    # The type tells the two kinds of address apart: a tuple is host and port, a string the path of a Unix socket.
    first_of_kind: dict[type, str] = {}
    for index, text in enumerate(listen if isinstance(listen, list) else [listen]):
        path: KeyPath = ("gateway", "listen", index) if isinstance(listen, list) else ("gateway", "listen")
        try:
            address = listen_address.parse_listen_entry(text) if isinstance(text, str) else None
        except ValueError:
            continue  # the schema reports it
        if address is None:
            continue
        if type(address) in first_of_kind:
            yield (
                path,
                f"{quote_value(first_of_kind[type(address)])} stands here already: give one HOST:PORT, one unix:PATH, "
                f"or both",
            )
        first_of_kind.setdefault(type(address), text)
        if isinstance(address, tuple) and gateway.get("api_key_env") is None and not is_loopback(address[0]):
            yield (
                path,
                f"listening on {address[0]} {listen_address.OPEN_LISTEN_MESSAGE}; {listen_address.OPEN_LISTEN_HINT}",
            )


def _check_tunnels(document: Mapping[str, Any]) -> Iterator[BrokenRule]:
    tunnels = _as_mapping(document.get("tunnels"))
    if tunnels.get("listen") == "unix" and str(tunnels.get("share")).lower() == "true":
        yield ("tunnels", "share"), "cannot hold for Unix sockets, which are your own user's: leave out one of the two"


def _check_one_location(backend: Mapping[str, Any], path: KeyPath) -> Iterator[BrokenRule]:
    location_keys = [key for key in backend if key in _LOCATION_KEYS and backend[key] is not None]
    if len(location_keys) > 1:
        yield (*path, location_keys[1]), f"{location_keys[0]} stands here already: give one of port, url and urls"
    if backend.get("urls") == []:
        yield (*path, "urls"), "names no URL"


def _check_node(node: Mapping[str, Any], defaults: Mapping[str, Any], path: KeyPath) -> Iterator[BrokenRule]:
    backend = _as_mapping(node.get("backend"))
    yield from _check_one_location(backend, (*path, "backend"))
    default_backend = _as_mapping(defaults.get("backend"))
    location_key = next(
        (key for section in (backend, default_backend) for key in _LOCATION_KEYS if section.get(key) is not None), None
    )
    if node.get("ssh") is None and node.get("address_from") is None:
        if location_key == "port":
            key_path = (*path, "backend", "port") if "port" in backend else path
            yield key_path, "a port is meant as seen from an ssh host: without `ssh`, write `url: http://127.0.0.1:…`"
        elif location_key is None:
            yield path, "has neither `ssh` nor a URL: say how to reach it, by `ssh: {host: …}` or `backend: {url: …}`"
        return
    ssh, default_ssh = node.get("ssh"), _as_mapping(defaults.get("ssh"))
    if isinstance(ssh, Mapping) and node.get("address_from") is None:
        names_host = any(section.get(key) is not None for section in (ssh, default_ssh) for key in ("host", "alias"))
        if not names_host:
            yield (*path, "ssh"), "does not say which host: give `host`, `alias` or the node's `address_from`"
    kind = backend.get("kind") or default_backend.get("kind")
    dialect = find_dialect(kind) if isinstance(kind, str) else None
    if location_key is None and dialect is not None and dialect.usual_port is None:
        yield (*path, "backend"), f"servers of kind {kind} have no usual port: give `port` or `url`"


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
