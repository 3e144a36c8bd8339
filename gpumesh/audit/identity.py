"""Who a node is: the right host, and not one that another node is already.

Two nodes are ways to one machine when nvidia-smi shows them a common GPU UUID: that is certain. Where it cannot be
asked, the host key tells, and else the model store: ``modified_at`` is the nanosecond at which *this* host stored a
model, so two routes that agree in every one of them reach one store (shared facts: ollama-api.md). Images made from
one template can share a host key, and a store may be on a network share: so both are said as likely, not as certain.

Where GPUs are known on both sides they have spoken: no key and no store makes one machine of different GPUs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from gpumesh.sentences import join_all
from gpumesh.state import BackendPhase, Finding, GpuState, ModelInfo, NodeState, Severity, TunnelPhase
from gpumesh.topology import NodeSpec

# Hosts stamp nanoseconds; a store copied or made by tools has whole seconds, equal by chance or by design.
_FINE = re.compile(r"\.[0-9]{7,9}(?:Z|[+-])")


class Proof(StrEnum):
    """By what nodes were found to be one machine, the strongest first."""

    GPU = "gpu"
    HOST_KEY = "host-key"
    STORE = "store"


@dataclass(frozen=True, slots=True)
class Machine:
    """Nodes that use the same GPUs, in the order of mesh.yaml. ``proof`` is the weakest link between them, ``None``
    for a node alone; ``shared_mark`` is what they have in common by it: a UUID, a fingerprint."""

    nodes: tuple[str, ...]
    gpus: tuple[GpuState, ...]
    proof: Proof | None = None
    shared_mark: str | None = None

    @property
    def certain(self) -> bool:
        return self.proof in (None, Proof.GPU)


def find_machines(nodes: Sequence[NodeState]) -> tuple[Machine, ...]:
    """Each node is in exactly one; in the order of their first nodes."""
    group = {node.name: node.name for node in nodes}
    order = {node.name: place for place, node in enumerate(nodes)}
    weakest: dict[str, tuple[Proof, str]] = {}

    def root(name: str) -> str:
        while group[name] != name:
            group[name] = group[group[name]]
            name = group[name]
        return name

    # The strong links first: what a weaker one then still joins is joined by that one alone.
    for proof in Proof:
        for mark, alike in _alike(nodes, proof).items():
            for one, other in _pairs(alike):
                if group[one.name] == group[other.name] or not _may_be_one(one, other, proof):
                    continue
                first, second = sorted((root(one.name), root(other.name)), key=order.__getitem__)
                if first != second:
                    group[second] = first
                    weakest[first] = (proof, mark)
    members: dict[str, list[NodeState]] = {}
    for node in nodes:
        members.setdefault(root(node.name), []).append(node)
    found = []
    for first, those in members.items():
        gpus = {gpu.uuid: gpu for node in those for gpu in node.gpus or ()}
        proof_, mark_ = weakest.get(first, (None, None)) if len(those) > 1 else (None, None)
        found.append(Machine(tuple(node.name for node in those), tuple(gpus.values()), proof_, mark_))
    return tuple(found)


def gpu_groups(nodes: Sequence[NodeState]) -> Mapping[str, str]:
    """Each node's group: nodes that share a GPU have the same, named for the first of them in order."""
    return {name: machine.nodes[0] for machine in find_machines(nodes) for name in machine.nodes}


def identifying_marks(node: NodeState) -> frozenset[str]:
    """What ``find_machines`` knows this node by: when it changes, it is time to ask again."""
    return frozenset(mark for proof in Proof for mark in _marks(node, proof)) | frozenset(
        filter(None, (_server(node),))
    )


# -- rules -----------------------------------------------------------------------------------------------------------


def check(spec: NodeSpec, state: NodeState) -> Iterator[Finding]:
    expected, found = spec.expect.hostname, state.host.hostname
    if expected is None or found is None or state.tunnel.state is not TunnelPhase.UP:
        return
    if not hostname_matches(expected, found):
        yield Finding(
            "hostname-differs",
            Severity.WARNING,
            spec.name,
            f"the host calls itself {found}, expected was {expected}",
            "if it is the right one (a container gets a new name at each start), change `expect.hostname`; "
            "else check the address: another machine answers there",
        )


def hostname_matches(expected: str, found: str) -> bool:
    """``box`` and ``box.example.org`` are one; ``box.a`` and ``box.b`` are not."""
    one, other = expected.strip().lower(), found.strip().lower()
    return one == other or (("." in one) != ("." in other) and one.split(".")[0] == other.split(".")[0])


def check_across_nodes(pairs: Sequence[tuple[NodeSpec, NodeState]]) -> Iterator[Finding]:
    """``same-gpu`` and ``tunnel-duplicate``: nodes that are one machine, under several names."""
    specs = {spec.name: spec for spec, _ in pairs}
    states = {state.name: state for _, state in pairs}
    told: set[str] = set()
    for names in find_duplicates([spec for spec, _ in pairs]):
        told.update(names)
        yield Finding(
            "tunnel-duplicate",
            Severity.WARNING,
            names[0],
            f"{join_all(names)} are the same server by the same way",
            f"delete {join_all(names[1:])} from mesh.yaml, or let `gpumesh audit --write` switch the rest off",
            nodes=tuple(names),
        )
    for machine in find_machines([state for _, state in pairs]):
        if machine.proof is None or told.issuperset(machine.nodes):
            continue
        keep = choose_node_to_keep(machine.nodes, specs, states)
        yield Finding(
            "same-gpu",
            Severity.WARNING,
            machine.nodes[0],
            f"{join_all(machine.nodes)} are {_how_known(machine)}",
            f"they count once in every total and are balanced as one; keep {keep} and delete the rest "
            "(`gpumesh audit --write` switches them off)",
            nodes=machine.nodes,
        )


def _how_known(machine: Machine) -> str:
    match machine.proof:
        case Proof.GPU:
            return f"one GPU, that is certain: nvidia-smi shows {machine.shared_mark} to each"
        case Proof.HOST_KEY:
            return f"most likely one machine: the same SSH host key, {machine.shared_mark}"
        case _:
            return "most likely one machine: one model store, the same in every model's time to the nanosecond"


def choose_node_to_keep(names: Sequence[str], specs: Mapping[str, NodeSpec], states: Mapping[str, NodeState]) -> str:
    """Of several ways to one GPU: one that serves, that sees the GPU, and that has no tunnel between."""

    def worth(name: str) -> tuple[bool, bool, bool]:
        state = states[name]
        return state.backend.state is BackendPhase.UP, bool(hardware_uuids(state)), specs[name].ssh is None

    return max(names, key=worth)  # of equals the first


def find_duplicates(specs: Sequence[NodeSpec]) -> Iterator[list[str]]:
    """By mesh.yaml alone: the same address, user and candidates."""
    ways: dict[object, list[str]] = {}
    for spec in specs:
        ssh = spec.ssh
        way = None
        if ssh is not None:
            if not ssh.host and ssh.address_from is None:
                continue
            way = (ssh.host.lower(), ssh.port, ssh.user, ssh.proxy_jump, ssh.address_from)
        ways.setdefault((way, spec.backend.targets), []).append(spec.name)
    for names in ways.values():
        if len(names) > 1:
            yield names


# -- what tells machines apart ---------------------------------------------------------------------------------------


def hardware_uuids(node: NodeState) -> set[str]:
    """Those that name one piece of hardware in the world; what a probe made up for an unknown one does not."""
    return {gpu.uuid for gpu in node.gpus or () if gpu.uuid.startswith(("GPU-", "MIG-")) and len(gpu.uuid) >= 12}


def store_fingerprint(catalog: Iterable[ModelInfo]) -> str | None:
    """A fingerprint of a model store; ``None`` for one that looks like others by chance."""
    models = tuple(catalog)
    stamps = sorted((model.name, model.modified_at) for model in models if model.modified_at)
    if not stamps or len(stamps) != len(models) or not any(_FINE.search(stamp) for _, stamp in stamps):
        return None
    return "store:" + hashlib.sha256(repr(stamps).encode(errors="surrogatepass")).hexdigest()[:16]


def _marks(node: NodeState, proof: Proof) -> Iterable[str]:
    match proof:
        case Proof.GPU:
            return hardware_uuids(node)
        case Proof.HOST_KEY:
            return node.tunnel.host_keys if node.tunnel.state is TunnelPhase.UP else ()
        case _:
            return filter(None, (store_fingerprint(node.backend.catalog),))


def _alike(nodes: Sequence[NodeState], proof: Proof) -> Mapping[str, list[NodeState]]:
    found: dict[str, list[NodeState]] = {}
    for node in nodes:
        for mark in sorted(_marks(node, proof)):
            found.setdefault(mark, []).append(node)
    return found


def _pairs(alike: Sequence[NodeState]) -> Iterator[tuple[NodeState, NodeState]]:
    return ((one, other) for place, other in enumerate(alike) for one in alike[:place])


def _may_be_one(one: NodeState, other: NodeState, proof: Proof) -> bool:
    return (proof is Proof.GPU or not (hardware_uuids(one) and hardware_uuids(other))) and not _different_servers(
        one, other
    )


def _different_servers(one: NodeState, other: NodeState) -> bool:
    """Two servers on one machine with several GPUs may well have one each: they are not taken for one.

    By their ports as the host knows them, so of SSH nodes only. Servers that share the host's only GPU are one to the
    balancer, however many they are.
    """
    first, second = _server(one), _server(other)
    if first is None or second is None or first == second:
        return False
    return all(len(node.gpus) != 1 for node in (one, other) if node.gpus)


def _server(node: NodeState) -> str | None:
    """The port in use, as the node's host knows it."""
    if node.tunnel.transport == "direct" or node.backend.url is None:
        return None
    targets = [route.target for route in node.routes if route.url == node.backend.url]
    return f"port:{urlsplit(targets[0]).port}" if targets else None
