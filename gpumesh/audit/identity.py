"""Rules about identity: whether a node is the expected host, and which nodes are one machine.

Two nodes are routes to one machine when nvidia-smi shows a common GPU UUID on both: that is certain. Where nvidia-smi
cannot be asked, the SSH host key tells, and else the model store: ``modified_at`` is the nanosecond at which *this*
host stored a model, so two nodes that agree in every ``modified_at`` reach one store (docs/internals/ollama.md). Images
made from one template can share a host key, and a store may be on a network share: so both count as likely, not as
certain.

Where GPUs are known on both sides, only they decide: no key and no store makes one machine of different GPUs.
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

# Ollama writes nanoseconds. A store that tools copied or made has whole seconds, which can be equal by chance.
_HAS_NANOSECONDS = re.compile(r"\.[0-9]{7,9}(?:Z|[+-])")


class Proof(StrEnum):
    """What shows that nodes are one machine, the strongest first."""

    GPU = "gpu"
    HOST_KEY = "host-key"
    STORE = "store"


@dataclass(frozen=True, slots=True)
class Machine:
    """Nodes that use the same GPUs, in the order of mesh.yaml. ``proof`` is the weakest link between them, ``None`` for
    a single node; ``shared_mark`` is the UUID or fingerprint that makes this link."""

    nodes: tuple[str, ...]
    gpus: tuple[GpuState, ...]
    proof: Proof | None = None
    shared_mark: str | None = None

    @property
    def certain(self) -> bool:
        return self.proof in (None, Proof.GPU)


def find_machines(nodes: Sequence[NodeState]) -> tuple[Machine, ...]:
    """Each node is in exactly one machine; the machines are in the order of their first nodes."""
    group = {node.name: node.name for node in nodes}
    order = {node.name: index for index, node in enumerate(nodes)}
    weakest: dict[str, tuple[Proof, str]] = {}

    def root(name: str) -> str:
        while group[name] != name:
            group[name] = group[group[name]]
            name = group[name]
        return name

    # Strong links first: nodes that a weaker link joins after that are joined by this link alone.
    for proof in Proof:
        for mark, holders in _group_by_mark(nodes, proof).items():
            for node, other in _pairs(holders):
                if group[node.name] == group[other.name] or not _may_be_one_machine(node, other, proof):
                    continue
                first, second = sorted((root(node.name), root(other.name)), key=order.__getitem__)
                if first != second:
                    group[second] = first
                    weakest[first] = (proof, mark)
    members: dict[str, list[NodeState]] = {}
    for node in nodes:
        members.setdefault(root(node.name), []).append(node)
    machines = []
    for first, group_nodes in members.items():
        gpus = {gpu.uuid: gpu for node in group_nodes for gpu in node.gpus or ()}
        proof_, mark_ = weakest.get(first, (None, None)) if len(group_nodes) > 1 else (None, None)
        machines.append(Machine(tuple(node.name for node in group_nodes), tuple(gpus.values()), proof_, mark_))
    return tuple(machines)


def gpu_groups(nodes: Sequence[NodeState]) -> Mapping[str, str]:
    """Each node's group. Nodes that share a GPU have the same group, named after the first of them in order."""
    return {name: machine.nodes[0] for machine in find_machines(nodes) for name in machine.nodes}


def identifying_marks(node: NodeState) -> frozenset[str]:
    """The marks by which ``find_machines`` recognises this node: when they change, machines must be found anew."""
    return frozenset(mark for proof in Proof for mark in _marks(node, proof)) | frozenset(
        filter(None, (_server_port(node),))
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
    """``box`` and ``box.example.org`` match; ``box.a`` and ``box.b`` do not."""
    expected, found = expected.strip().lower(), found.strip().lower()
    if expected == found:
        return True
    only_one_has_domain = ("." in expected) != ("." in found)
    return only_one_has_domain and expected.split(".")[0] == found.split(".")[0]


def check_across_nodes(pairs: Sequence[tuple[NodeSpec, NodeState]]) -> Iterator[Finding]:
    """The findings ``same-gpu`` and ``tunnel-duplicate``: several nodes that are one machine."""
    specs = {spec.name: spec for spec, _ in pairs}
    states = {state.name: state for _, state in pairs}
    reported: set[str] = set()
    for names in find_duplicates([spec for spec, _ in pairs]):
        reported.update(names)
        yield Finding(
            "tunnel-duplicate",
            Severity.WARNING,
            names[0],
            f"{join_all(names)} are the same server by the same way",
            f"delete {join_all(names[1:])} from mesh.yaml, or let `gpumesh audit --write` switch the rest off",
            nodes=tuple(names),
        )
    for machine in find_machines([state for _, state in pairs]):
        if machine.proof is None or reported.issuperset(machine.nodes):
            continue
        keep = choose_node_to_keep(machine.nodes, specs, states)
        yield Finding(
            "same-gpu",
            Severity.WARNING,
            machine.nodes[0],
            f"{join_all(machine.nodes)} are {_describe_proof(machine)}",
            f"they count once in every total and are balanced as one; keep {keep} and delete the rest "
            "(`gpumesh audit --write` switches them off)",
            nodes=machine.nodes,
        )


def _describe_proof(machine: Machine) -> str:
    match machine.proof:
        case Proof.GPU:
            return f"one GPU, that is certain: nvidia-smi shows {machine.shared_mark} to each"
        case Proof.HOST_KEY:
            return f"most likely one machine: the same SSH host key, {machine.shared_mark}"
        case _:
            return "most likely one machine: one model store, the same in every model's time to the nanosecond"


def choose_node_to_keep(names: Sequence[str], specs: Mapping[str, NodeSpec], states: Mapping[str, NodeState]) -> str:
    """Of several nodes with one GPU the first that serves, that shows the GPU, and that needs no tunnel; in this
    order of importance."""

    def rank(name: str) -> tuple[bool, bool, bool]:
        state = states[name]
        return state.backend.state is BackendPhase.UP, bool(hardware_uuids(state)), specs[name].ssh is None

    return max(names, key=rank)  # max takes the first of equals


def find_duplicates(specs: Sequence[NodeSpec]) -> Iterator[list[str]]:
    """Nodes that are the same by mesh.yaml alone: address, user and candidates."""
    by_way: dict[object, list[str]] = {}
    for spec in specs:
        ssh = spec.ssh
        way = None
        if ssh is not None:
            if not ssh.host and ssh.address_from is None:
                continue
            way = (ssh.host.lower(), ssh.port, ssh.user, ssh.proxy_jump, ssh.address_from)
        by_way.setdefault((way, spec.backend.targets), []).append(spec.name)
    for names in by_way.values():
        if len(names) > 1:
            yield names


# -- what tells machines apart ---------------------------------------------------------------------------------------


def hardware_uuids(node: NodeState) -> set[str]:
    """The UUIDs of real hardware, without those that a probe made up for a GPU whose UUID is unknown."""
    return {gpu.uuid for gpu in node.gpus or () if gpu.uuid.startswith(("GPU-", "MIG-")) and len(gpu.uuid) >= 12}


def store_fingerprint(catalog: Iterable[ModelInfo]) -> str | None:
    """A fingerprint of a model store; ``None`` for a store that another one could equal by chance."""
    models = tuple(catalog)
    stamps = sorted((model.name, model.modified_at) for model in models if model.modified_at)
    if not stamps or len(stamps) != len(models) or not any(_HAS_NANOSECONDS.search(stamp) for _, stamp in stamps):
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


def _group_by_mark(nodes: Sequence[NodeState], proof: Proof) -> Mapping[str, list[NodeState]]:
    holders: dict[str, list[NodeState]] = {}
    for node in nodes:
        for mark in sorted(_marks(node, proof)):
            holders.setdefault(mark, []).append(node)
    return holders


def _pairs(nodes: Sequence[NodeState]) -> Iterator[tuple[NodeState, NodeState]]:
    return ((earlier, node) for index, node in enumerate(nodes) for earlier in nodes[:index])


def _may_be_one_machine(node: NodeState, other: NodeState, proof: Proof) -> bool:
    if _may_have_own_gpus(node, other):
        return False
    return proof is Proof.GPU or not (hardware_uuids(node) and hardware_uuids(other))


def _may_have_own_gpus(node: NodeState, other: NodeState) -> bool:
    """Whether these are two servers of a machine with several GPUs: each may have GPUs of its own, so the nodes do not
    count as one machine.

    Servers are distinguished by their ports on the host, which are known of SSH nodes only. Servers that share the
    host's only GPU are one to the balancer, however many they are.
    """
    port, other_port = _server_port(node), _server_port(other)
    if port is None or other_port is None or port == other_port:
        return False
    return all(len(each.gpus) != 1 for each in (node, other) if each.gpus)


def _server_port(node: NodeState) -> str | None:
    """The port in use, as the node's host knows it."""
    if node.tunnel.transport == "direct" or node.backend.url is None:
        return None
    targets = [route.target for route in node.routes if route.url == node.backend.url]
    return f"port:{urlsplit(targets[0]).port}" if targets else None
