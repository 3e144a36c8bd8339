"""Rules about identity: whether a node is the expected host, and which nodes are one machine.

A common GPU UUID in both nodes' nvidia-smi proves that two nodes are routes to one machine. Where nvidia-smi cannot be
asked, a common SSH host key shows it, and without a key the model store: ``modified_at`` is the nanosecond at which
*this* host stored a model, so two nodes that agree in every ``modified_at`` reach one store
(docs/internals/ollama.md). Images made from one template can share a host key, and a store may be on a network share.
So these two proofs count as likely, not as certain.

If the GPUs of both nodes are known, only the GPUs decide. Two nodes with different GPUs are two machines, even if they
have a host key or a store in common.
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

# Ollama writes nanoseconds. A store that other tools copied or made has whole seconds, which can be equal by chance.
_HAS_NANOSECONDS = re.compile(r"\.[0-9]{7,9}(?:Z|[+-])")


class Proof(StrEnum):
    """The kinds of proof that nodes are one machine, the strongest first."""

    GPU = "gpu"
    HOST_KEY = "host-key"
    STORE = "store"


@dataclass(frozen=True, slots=True)
class Machine:
    """Nodes that use the same GPUs, in the order of mesh.yaml. ``proof`` is the weakest proof that was needed to join
    them, ``None`` for a single node; ``shared_mark`` is the UUID or fingerprint of this proof."""

    nodes: tuple[str, ...]
    gpus: tuple[GpuState, ...]
    proof: Proof | None = None
    shared_mark: str | None = None

    @property
    def certain(self) -> bool:
        return self.proof in (None, Proof.GPU)


def find_machines(nodes: Sequence[NodeState]) -> tuple[Machine, ...]:
    """Groups the nodes: each node is in exactly one machine. The machines are in the order of their first nodes."""
    # A union-find: `parent` leads from each node to the first node of its machine, which is its own parent.
    parent = {node.name: node.name for node in nodes}
    order = {node.name: index for index, node in enumerate(nodes)}
    last_join: dict[str, tuple[Proof, str]] = {}  # the proof and the mark, by the machine's first node

    def find_first_node(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    # The strongest proof first: so the last join of a machine is by its weakest proof.
    for proof in Proof:
        for mark, holders in _group_by_mark(nodes, proof).items():
            for node, other in _pairs(holders):
                if parent[node.name] == parent[other.name] or not _may_be_one_machine(node, other, proof):
                    continue
                first_nodes = find_first_node(node.name), find_first_node(other.name)
                earlier, later = sorted(first_nodes, key=order.__getitem__)
                if earlier != later:
                    parent[later] = earlier
                    last_join[earlier] = (proof, mark)
    members: dict[str, list[NodeState]] = {}
    for node in nodes:
        members.setdefault(find_first_node(node.name), []).append(node)
    machines = []
    for first, machine_nodes in members.items():
        gpus = {gpu.uuid: gpu for node in machine_nodes for gpu in node.gpus or ()}
        weakest_proof, shared_mark = last_join.get(first, (None, None))
        names = tuple(node.name for node in machine_nodes)
        machines.append(Machine(names, tuple(gpus.values()), weakest_proof, shared_mark))
    return tuple(machines)


def gpu_groups(nodes: Sequence[NodeState]) -> Mapping[str, str]:
    """Each node's group by the node's name. The nodes of one machine have one group, whose name is that of the first of
    these nodes."""
    return {name: machine.nodes[0] for machine in find_machines(nodes) for name in machine.nodes}


def identifying_marks(node: NodeState) -> frozenset[str]:
    """The marks by which ``find_machines`` recognises this node. When they change, ``find_machines`` must run again."""
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
    """The best of several nodes with one GPU: one that serves, then one that shows the GPU, then one without SSH. Of
    equal nodes the first."""

    def rank(name: str) -> tuple[bool, bool, bool]:
        state = states[name]
        return state.backend.state is BackendPhase.UP, bool(hardware_uuids(state)), specs[name].ssh is None

    return max(names, key=rank)  # max returns the first of equals


def find_duplicates(specs: Sequence[NodeSpec]) -> Iterator[list[str]]:
    """Groups of nodes that have the same address, user and candidates in mesh.yaml."""
    names_by_route: dict[object, list[str]] = {}
    for spec in specs:
        ssh = spec.ssh
        login = None
        if ssh is not None:
            if not ssh.host and ssh.address_from is None:
                continue  # an alias, whose address is not in mesh.yaml
            login = (ssh.host.lower(), ssh.port, ssh.user, ssh.proxy_jump, ssh.address_from)
        names_by_route.setdefault((login, spec.backend.targets), []).append(spec.name)
    for names in names_by_route.values():
        if len(names) > 1:
            yield names


# -- marks: what shows that nodes are one machine ----------------------------------------------------------------------


def hardware_uuids(node: NodeState) -> set[str]:
    """The UUIDs that nvidia-smi shows, without those that a probe made up for a GPU whose UUID is unknown."""
    return {gpu.uuid for gpu in node.gpus or () if gpu.uuid.startswith(("GPU-", "MIG-")) and len(gpu.uuid) >= 12}


def store_fingerprint(catalog: Iterable[ModelInfo]) -> str | None:
    """A fingerprint of a model store; ``None`` if another store could have the same one by chance."""
    models = tuple(catalog)
    if not models or not all(model.modified_at for model in models):
        return None
    if not any(_HAS_NANOSECONDS.search(model.modified_at or "") for model in models):
        return None
    names_and_times = sorted((model.name, model.modified_at) for model in models)
    return "store:" + hashlib.sha256(repr(names_and_times).encode(errors="surrogatepass")).hexdigest()[:16]


def _marks(node: NodeState, proof: Proof) -> Iterable[str]:
    match proof:
        case Proof.GPU:
            return hardware_uuids(node)
        case Proof.HOST_KEY:
            return node.tunnel.host_keys if node.tunnel.state is TunnelPhase.UP else ()
        case _:
            return filter(None, (store_fingerprint(node.backend.catalog),))


def _group_by_mark(nodes: Sequence[NodeState], proof: Proof) -> Mapping[str, list[NodeState]]:
    """The nodes that have a mark, for each mark of this kind of proof."""
    holders: dict[str, list[NodeState]] = {}
    for node in nodes:
        for mark in sorted(_marks(node, proof)):
            holders.setdefault(mark, []).append(node)
    return holders


def _pairs(nodes: Sequence[NodeState]) -> Iterator[tuple[NodeState, NodeState]]:
    """Each two of the nodes."""
    return ((earlier, node) for index, node in enumerate(nodes) for earlier in nodes[:index])


def _may_be_one_machine(node: NodeState, other: NodeState, proof: Proof) -> bool:
    """Whether a common mark of this kind of proof may join the nodes."""
    if _may_have_own_gpus(node, other):
        return False
    return proof is Proof.GPU or not (hardware_uuids(node) and hardware_uuids(other))


def _may_have_own_gpus(node: NodeState, other: NodeState) -> bool:
    """Whether the nodes may be two servers on one host with several GPUs. Then each may have GPUs of its own, so the
    nodes do not count as one machine.

    Two servers of a host have different ports there. These ports are known of SSH nodes only. Servers that share the
    host's only GPU are one machine to the balancer, however many they are.
    """
    port, other_port = _server_port(node), _server_port(other)
    if port is None or other_port is None or port == other_port:
        return False
    one_has_single_gpu = any(len(state.gpus) == 1 for state in (node, other) if state.gpus)
    return not one_has_single_gpu


def _server_port(node: NodeState) -> str | None:
    """The port of the server in use on the node's host, as a mark; ``None`` where it is not known."""
    if node.tunnel.transport == "direct" or node.backend.url is None:
        return None
    targets = [route.target for route in node.routes if route.url == node.backend.url]
    return f"port:{urlsplit(targets[0]).port}" if targets else None
