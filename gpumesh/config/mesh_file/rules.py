"""The rules between keys of mesh.yaml. Pure.

They are checked on plain values, of which any may have the wrong type, so that broken rules are reported together with
the errors of the schema.
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
    """The broken rules, each with the path of its key."""
    yield from _gateway(document)
    yield from _tunnels(document)
    defaults = _as_mapping(document.get("defaults"))
    yield from _check_one_location(_as_mapping(defaults.get("backend")), ("defaults", "backend"))
    if document.get("nodes") is None or document["nodes"] == []:
        yield ("nodes",), "names no node: write at least one, such as `- {name: local, backend: {url: …}}`"
    nodes = document.get("nodes")
    if isinstance(nodes, Mapping):
        example = next((name for name in nodes if re.fullmatch(NAME_PATTERN, name)), "iceland")
        yield ("nodes",), f"nodes are a list: write `- name: {example}`"
    if not isinstance(nodes, list):
        return
    first: dict[str, int] = {}
    for index, entry in enumerate(nodes):
        node = _as_mapping(entry)
        name = node.get("name")
        if isinstance(name, str):
            if name in first:
                yield ("nodes", index, "name"), f"{quote_value(name)} is the name of nodes[{first[name]}] already"
            first.setdefault(name, index)
        if node:
            yield from _node(node, defaults, ("nodes", index))


def _gateway(document: Mapping[str, Any]) -> Iterator[BrokenRule]:
    gateway = _as_mapping(document.get("gateway"))
    listen = gateway.get("listen")
    if listen == []:
        yield ("gateway", "listen"), "names no address"
    seen: dict[type, str] = {}
    for index, text in enumerate(listen if isinstance(listen, list) else [listen]):
        path: KeyPath = ("gateway", "listen", index) if isinstance(listen, list) else ("gateway", "listen")
        try:
            place = listen_address.parse_listen_entry(text) if isinstance(text, str) else None
        except ValueError:
            continue  # the schema reports it
        if place is None:
            continue
        if type(place) in seen:
            yield (
                path,
                f"{quote_value(seen[type(place)])} stands here already: give one HOST:PORT, one unix:PATH, or both",
            )
        seen.setdefault(type(place), text)
        if isinstance(place, tuple) and gateway.get("api_key_env") is None and not is_loopback(place[0]):
            yield (
                path,
                f"listening on {place[0]} {listen_address.OPEN_LISTEN_MESSAGE}; {listen_address.OPEN_LISTEN_HINT}",
            )


def _tunnels(document: Mapping[str, Any]) -> Iterator[BrokenRule]:
    tunnels = _as_mapping(document.get("tunnels"))
    if tunnels.get("listen") == "unix" and str(tunnels.get("share")).lower() == "true":
        yield ("tunnels", "share"), "cannot hold for Unix sockets, which are your own user's: leave out one of the two"


def _check_one_location(backend: Mapping[str, Any], path: KeyPath) -> Iterator[BrokenRule]:
    given = [key for key in backend if key in _LOCATION_KEYS and backend[key] is not None]
    if len(given) > 1:
        yield (*path, given[1]), f"{given[0]} stands here already: give one of port, url and urls"
    if backend.get("urls") == []:
        yield (*path, "urls"), "names no URL"


def _node(node: Mapping[str, Any], defaults: Mapping[str, Any], path: KeyPath) -> Iterator[BrokenRule]:
    backend = _as_mapping(node.get("backend"))
    yield from _check_one_location(backend, (*path, "backend"))
    shared = _as_mapping(defaults.get("backend"))
    where = next((key for source in (backend, shared) for key in _LOCATION_KEYS if source.get(key) is not None), None)
    kind = backend.get("kind") or shared.get("kind")
    if node.get("ssh") is None and node.get("address_from") is None:
        if where == "port":
            at = (*path, "backend", "port") if "port" in backend else path
            yield at, "a port is meant as seen from an ssh host: without `ssh`, write `url: http://127.0.0.1:…`"
        elif where is None:
            yield path, "has neither `ssh` nor a URL: say how to reach it, by `ssh: {host: …}` or `backend: {url: …}`"
        return
    ssh, shared_ssh = node.get("ssh"), _as_mapping(defaults.get("ssh"))
    if (ssh is None or isinstance(ssh, Mapping)) and node.get("address_from") is None:
        named = any(
            source.get(key) is not None for source in (_as_mapping(ssh), shared_ssh) for key in ("host", "alias")
        )
        if not named:
            yield (*path, "ssh"), "does not say which host: give `host`, `alias` or the node's `address_from`"
    dialect = find_dialect(kind) if isinstance(kind, str) else None
    if where is None and dialect is not None and dialect.usual_port is None:
        yield (*path, "backend"), f"servers of kind {kind} have no usual port: give `port` or `url`"


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
