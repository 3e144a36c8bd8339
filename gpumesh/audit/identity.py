"""Who a node is: the right host, and not one that another node is already.

Two nodes are one machine's when nvidia-smi shows them a common GPU UUID: that is certain. Where it cannot be asked,
the model store tells: ``modified_at`` is the nanosecond at which *this* host stored a model, so two routes that agree
in every one of them reach one store (shared facts: ollama-api.md). A store on a network share would look the same,
so that is said as likely, not as certain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from gpumesh.state import Finding, GpuState, NodeState, Severity, TunnelPhase
from gpumesh.topology import NodeSpec

# Hosts stamp nanoseconds; a store copied or made by tools has whole seconds, equal by chance or by design.
_FINE = re.compile(r"\.[0-9]{7,9}(?:Z|[+-])")


def check(spec: NodeSpec, state: NodeState) -> Iterator[Finding]:
    expected, found = spec.expect.hostname, state.host.hostname
    if expected is None or found is None or state.tunnel.state is not TunnelPhase.UP:
        return
    if not _same_host(expected, found):
        yield Finding(
            "hostname-differs",
            Severity.WARNING,
            spec.name,
            f"the host calls itself {found}, expected was {expected}",
            "if it is the right one (a container gets a new name at each start), change `expect.hostname`; "
            "else check the address: another machine answers there",
        )


def _same_host(expected: str, found: str) -> bool:
    """``box`` and ``box.example.org`` are one; ``box.a`` and ``box.b`` are not."""
    one, other = expected.strip().lower(), found.strip().lower()
    return one == other or (("." in one) != ("." in other) and one.split(".")[0] == other.split(".")[0])


def across(pairs: Sequence[tuple[NodeSpec, NodeState]]) -> Iterator[Finding]:
    """``same-gpu`` and ``tunnel-duplicate``: nodes that are one machine, under several names."""
    specs = {spec.name: spec for spec, _ in pairs}
    states = {state.name: state for _, state in pairs}
    groups: dict[str, list[str]] = {}
    for name, group in gpu_groups([state for _, state in pairs]).items():
        groups.setdefault(group, []).append(name)
    told: set[str] = set()
    for names in _duplicates([spec for spec, _ in pairs]):
        told.update(names)
        yield Finding(
            "tunnel-duplicate",
            Severity.WARNING,
            names[0],
            f"{_and(names)} are the same server by the same way",
            f"delete {_and(names[1:])} from mesh.yaml",
            nodes=tuple(names),
        )
    for names in groups.values():
        if len(names) < 2 or told.issuperset(names):
            continue
        shared = set.intersection(*(_uuids(states[name]) for name in names))
        certain = _certain(names, states)
        how = f"GPU {min(shared)}" if shared else ("GPUs" if certain else "one model store, to the nanosecond")
        known = f"share {how}" if certain else f"have {how}: most likely one machine"
        direct = [name for name in names if specs[name].ssh is None]
        keep = direct[0] if direct else names[0]
        yield Finding(
            "same-gpu",
            Severity.WARNING,
            names[0],
            f"{_and(names)} {known}",
            f"they count once in every total and are balanced as one; keep {keep} and delete the rest, "
            "or add its route as a candidate under `backend.urls`",
            nodes=tuple(names),
        )


def gpu_groups(nodes: Sequence[NodeState]) -> Mapping[str, str]:
    """Each node's group: nodes that share a GPU have the same, named for the first of them in order."""
    group = {node.name: node.name for node in nodes}
    order = {node.name: place for place, node in enumerate(nodes)}

    def root(name: str) -> str:
        while group[name] != name:
            group[name] = group[group[name]]
            name = group[name]
        return name

    def unite(one: str, other: str) -> None:
        first, second = sorted((root(one), root(other)), key=order.__getitem__)
        group[second] = first

    by_uuid: dict[str, str] = {}
    by_store: dict[frozenset[tuple[str, str]], list[NodeState]] = {}
    for node in nodes:
        for uuid in _uuids(node):
            unite(node.name, by_uuid.setdefault(uuid, node.name))
        store = _store(node)
        if store is not None:
            by_store.setdefault(store, []).append(node)
    for alike in by_store.values():
        for place, node in enumerate(alike):
            for other in alike[:place]:
                if not (_uuids(node) and _uuids(other)):  # where both have GPUs, those have spoken
                    unite(node.name, other.name)
    return {name: root(name) for name in group}


def _certain(names: Sequence[str], states: Mapping[str, NodeState]) -> bool:
    return all(_uuids(states[name]) for name in names)


def _uuids(node: NodeState) -> set[str]:
    """Those that name one piece of hardware in the world; what a probe made up for an unknown one does not."""
    return {gpu.uuid for gpu in node.gpus or () if _is_uuid(gpu)}


def _is_uuid(gpu: GpuState) -> bool:
    return gpu.uuid.startswith(("GPU-", "MIG-")) and len(gpu.uuid) >= 12


def _store(node: NodeState) -> frozenset[tuple[str, str]] | None:
    stamps = frozenset((model.name, model.modified_at) for model in node.backend.catalog if model.modified_at)
    if not stamps or len(stamps) != len(node.backend.catalog):
        return None
    return stamps if any(_FINE.search(stamp) for _, stamp in stamps) else None


def _duplicates(specs: Sequence[NodeSpec]) -> Iterator[list[str]]:
    """By mesh.yaml alone: the same address, user and candidates."""
    ways: dict[object, list[str]] = {}
    for spec in specs:
        ssh = spec.ssh
        way = None if ssh is None else (ssh.host.lower(), ssh.port, ssh.user, ssh.proxy_jump)
        ways.setdefault((way, spec.backend.targets), []).append(spec.name)
    for names in ways.values():
        if len(names) > 1:
            yield names


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
