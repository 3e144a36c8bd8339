"""The rules of mesh.yaml for ``pools``: names that must exist or must differ, and hosts that can run programs. Pure.

As in ``rules``, a value of the wrong type breaks no rule here: the schema reports it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpumesh.config.mesh_file.error_messages import did_you_mean, quote_value
from gpumesh.config.mesh_file.model_rules import describe_unknown_node, entries
from gpumesh.config.mesh_file.yaml_tree import Fault, KeyPath
from gpumesh.config.value_parsers import NAME_PATTERN
from gpumesh.pool_spec import PoolSpec
from gpumesh.topology import NodeSpec

BrokenRule = tuple[KeyPath, str]  # the path of the key, and a message


def check_pools(pools: Any, node_names: Sequence[str]) -> Iterator[BrokenRule]:
    """Yields the broken rules of ``pools``. ``node_names`` are the nodes of the mesh."""
    if isinstance(pools, Mapping):  # a person has written the names of the pools as keys
        example_name = next((name for name in pools if re.fullmatch(NAME_PATTERN, name)), "big")
        yield ("pools",), f"pools are a list: write `- name: {example_name}`"
    first_index_of: dict[str, int] = {}
    for index, pool in enumerate(pools if isinstance(pools, list) else ()):
        if not isinstance(pool, Mapping):
            continue
        path: KeyPath = ("pools", index)
        name = pool.get("name")
        if isinstance(name, str):
            first_index = first_index_of.setdefault(name, index)
            if name in node_names:
                yield (*path, "name"), f"{quote_value(name)} is the name of a node: a pool needs one of its own"
            elif first_index != index:
                yield (*path, "name"), f"{quote_value(name)} is the name of pools[{first_index}] already"
        yield from _check_members(pool, node_names, path)


def pool_names(pools: Any) -> list[str]:
    """The names of the pools that can be read."""
    found = [pool.get("name") for pool in pools if isinstance(pool, Mapping)] if isinstance(pools, list) else []
    return [name for name in found if isinstance(name, str)]


def _check_members(pool: Mapping[str, Any], node_names: Sequence[str], path: KeyPath) -> Iterator[BrokenRule]:
    """Yields what is wrong with the nodes of one pool, its head and its split, which go by these nodes."""
    nodes = pool.get("nodes")
    if nodes == []:
        yield (*path, "nodes"), "names no node: a pool needs one at least"
    member_names: list[str] = []
    for member_path, name in _name_members(nodes, (*path, "nodes")):
        if name not in node_names:
            yield member_path, describe_unknown_node(name, node_names)
        elif name in member_names:
            yield member_path, f"{quote_value(name)} stands here already"
        member_names.append(name)
    head = pool.get("head")
    if isinstance(head, str) and member_names and head not in member_names:
        yield (*path, "head"), _describe_wrong_head(head, member_names, node_names)
    yield from _check_split(pool.get("split"), nodes, (*path, "split"))


def _name_members(nodes: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Yields the name of each of a pool's nodes, with the path of the name."""
    if not isinstance(nodes, list):
        yield from entries(nodes, path)
        return
    for index, member in enumerate(nodes):
        if isinstance(member, str):
            yield (*path, index), member
        elif isinstance(member, Mapping) and isinstance(member.get("node"), str):
            yield (*path, index, "node"), member["node"]


def _describe_wrong_head(head: str, member_names: Sequence[str], node_names: Sequence[str]) -> str:
    """The message for a head that is none of its pool's nodes."""
    if head in node_names:
        return f"{quote_value(head)} is none of the pool's nodes, and the head is one of them: add it to `nodes`"
    guess = did_you_mean(head, member_names)
    end = f"did you mean {guess}?" if guess is not None else f"the pool's nodes are: {', '.join(member_names)[:300]}"
    return f"there is no node {quote_value(head)}; {end}"


def _check_split(split: Any, nodes: Any, path: KeyPath) -> Iterator[BrokenRule]:
    """Yields a split that has not one number of layers for each node of the pool, or that gives no layer at all."""
    node_count = len(nodes) if isinstance(nodes, list) else 1
    if not isinstance(split, list) or nodes is None:
        return
    if len(split) != node_count:
        yield path, f"has {len(split)} numbers, and the pool has {node_count}: one number of layers for each of `nodes`"
    elif all(count == "0" for count in split):
        yield path, "gives no node a layer"


def find_nodes_without_host(pools: Sequence[PoolSpec], nodes: Sequence[NodeSpec]) -> Iterator[Fault]:
    """Yields a fault for each node of a pool that is a URL of another machine, where no program can be started."""
    specs = {node.name: node for node in nodes}
    for pool_index, pool in enumerate(pools):
        for member_index, member in enumerate(pool.members):
            if not specs[member.node].has_host:
                message = (
                    f"{quote_value(member.node)} is known by its URL alone, and a pool starts programs on its hosts: "
                    "give the node an `ssh`"
                )
                yield Fault(message, None, ("pools", pool_index, "nodes", member_index))
