"""The audit's rules about identity: whether a node is the expected host, and which nodes are one machine or GPU.

A common GPU UUID in both nodes' nvidia-smi proves that two nodes are routes to one machine. Where nvidia-smi gives no
answer, a common SSH host key is the proof, and without a key the model store: ``modified_at`` is the nanosecond at
which *this* host stored a model, so two nodes that agree in every ``modified_at`` reach one store
(docs/internals/ollama.md). Images made from one template can share a host key, and a store may be on a network share.
So these two proofs count as likely, not as certain.

If the GPUs of both nodes are known, only the GPUs decide. Two nodes with different GPUs are two machines, even if they
have a host key or a store in common.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from gpumesh.state import BackendPhase, Finding, GpuState, ModelInfo, NodeState, Severity, TunnelPhase
from gpumesh.text.sentences import join_all
from gpumesh.topology import NodeSpec

# Ollama writes nanoseconds. A store that other tools copied or made has whole seconds, which can be equal by chance.
_HAS_NANOSECONDS = re.compile(r"\.[0-9]{7,9}(?:Z|[+-])")  # a fraction with seven or more digits, before the time zone
_MIN_UUID_LENGTH = 12  # a real UUID has 40 characters; a text of a few characters could be the same by chance


class Proof(StrEnum):
    """The kinds of proof that nodes are one machine, the strongest first."""

    GPU = "gpu"
    HOST_KEY = "host-key"
    STORE = "store"


@dataclass(frozen=True, slots=True)
class Machine:
    """Nodes that are one machine and so use the same GPUs. ``nodes`` are their names, in the order of mesh.yaml.

    ``proof`` is the weakest proof that was needed to join the nodes, because the machine is only as certain as this
    proof. ``shared_mark`` is the UUID or fingerprint of this proof. For a single node, both are ``None``.
    """

    nodes: tuple[str, ...]
    gpus: tuple[GpuState, ...]
    proof: Proof | None = None
    shared_mark: str | None = None

    @property
    def certain(self) -> bool:
        """Whether it is certain that the nodes are one machine: their GPUs prove it, or there is only one node."""
        return self.proof in (None, Proof.GPU)


class _JoinedNodes:
    """Nodes by name, which are joined step by step until each group is one machine: a union-find."""

    def __init__(self, names: Sequence[str]) -> None:
        self._positions = {name: position for position, name in enumerate(names)}
        # The parents of a node lead to the first node of its group, which is its own parent.
        self._parents = {name: name for name in names}
        self.last_joins: dict[str, tuple[Proof, str]] = {}
        """The proof and the mark of each group's last join, by the group's first node."""

    def find_first_node(self, name: str) -> str:
        """Returns the first node of the node's group."""
        while self._parents[name] != name:
            self._parents[name] = self._parents[self._parents[name]]  # a shorter way for the next call
            name = self._parents[name]
        return name

    def join(self, name: str, other: str, proof: Proof, mark: str) -> None:
        """Joins the groups of two nodes, and records by which proof. Nothing changes if they are joined already."""
        first_nodes = self.find_first_node(name), self.find_first_node(other)
        earlier, later = sorted(first_nodes, key=self._positions.__getitem__)
        if earlier != later:
            self._parents[later] = earlier  # so the parents still lead to the first node of the group
            self.last_joins[earlier] = (proof, mark)


def find_machines(nodes: Sequence[NodeState]) -> tuple[Machine, ...]:
    """Groups the nodes into machines, in the order of their first nodes. Each node is in exactly one machine."""
    joined = _JoinedNodes([node.name for node in nodes])
    # The strongest proof first: so the last join of a machine is by its weakest proof.
    for proof in Proof:
        for mark, holders in _group_by_mark(nodes, proof).items():
            for node, other in itertools.combinations(holders, 2):
                are_joined = joined.find_first_node(node.name) == joined.find_first_node(other.name)
                if not are_joined and _may_be_one_machine(node, other, proof):
                    joined.join(node.name, other.name, proof, mark)
    nodes_by_first_node: dict[str, list[NodeState]] = {}
    for node in nodes:
        nodes_by_first_node.setdefault(joined.find_first_node(node.name), []).append(node)
    machines: list[Machine] = []
    for first_node, machine_nodes in nodes_by_first_node.items():
        names = tuple(node.name for node in machine_nodes)
        gpus = {gpu.uuid: gpu for node in machine_nodes for gpu in node.gpus or ()}
        weakest_proof, shared_mark = joined.last_joins.get(first_node, (None, None))
        machines.append(Machine(names, tuple(gpus.values()), weakest_proof, shared_mark))
    return tuple(machines)


def gpu_groups(nodes: Sequence[NodeState]) -> Mapping[str, str]:
    """Returns each node's group, by the node's name: the name of the first node of the same machine."""
    groups: dict[str, str] = {}
    for machine in find_machines(nodes):
        for name in machine.nodes:
            groups[name] = machine.nodes[0]
    return groups


def identifying_marks(node: NodeState) -> frozenset[str]:
    """Returns the marks by which ``find_machines`` recognises this node. If they change, the machines may change."""
    marks = {mark for proof in Proof for mark in _marks(node, proof)}
    port_mark = _server_port(node)  # also decides about the machines: see ``_may_have_own_gpus``
    if port_mark is not None:
        marks.add(port_mark)
    return frozenset(marks)


# -- rules -----------------------------------------------------------------------------------------------------------


def check(spec: NodeSpec, state: NodeState) -> Iterator[Finding]:
    """Yields ``hostname-differs`` if the host of a node whose tunnel is up has another name than mesh.yaml expects.

    No finding if mesh.yaml expects no name, or if the host's name is unknown.
    """
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
    """Whether two host names may be those of one host: they are equal, or only one of them has a domain.

    ``box`` and ``box.example.org`` match; ``box.a`` and ``box.b`` do not.
    """
    expected, found = expected.strip().lower(), found.strip().lower()
    if expected == found:
        return True
    expected_host, dot_in_expected, _domain = expected.partition(".")
    found_host, dot_in_found, _domain = found.partition(".")
    only_one_has_domain = bool(dot_in_expected) != bool(dot_in_found)
    return only_one_has_domain and expected_host == found_host


def check_across_nodes(pairs: Sequence[tuple[NodeSpec, NodeState]]) -> Iterator[Finding]:
    """Yields ``tunnel-duplicate`` for nodes that mesh.yaml has twice, and ``same-gpu`` for nodes that are one machine.

    Nodes with ``tunnel-duplicate`` have no ``same-gpu`` among themselves: the first finding says it already. The node
    of a pool uses the GPUs of other nodes, as mesh.yaml says: that is no finding.
    """
    specs = {spec.name: spec for spec, _state in pairs if not spec.pool_members}
    states = {state.name: state for spec, state in pairs if not spec.pool_members}
    duplicate_names: set[str] = set()
    for names in find_duplicates(list(specs.values())):
        duplicate_names.update(names)
        yield Finding(
            "tunnel-duplicate",
            Severity.WARNING,
            names[0],
            f"{join_all(names)} are the same server by the same way",
            f"delete {join_all(names[1:])} from mesh.yaml, or let `gpumesh audit --write` switch the rest off",
            nodes=tuple(names),
        )
    for machine in find_machines(list(states.values())):
        is_single_node = machine.proof is None
        if is_single_node or duplicate_names.issuperset(machine.nodes):
            continue
        node_to_keep = choose_node_to_keep(machine.nodes, specs, states)
        yield Finding(
            "same-gpu",
            Severity.WARNING,
            machine.nodes[0],
            f"{join_all(machine.nodes)} are {_describe_proof(machine)}",
            f"they count once in every total and are balanced as one; keep {node_to_keep} and delete the rest "
            "(`gpumesh audit --write` switches them off)",
            nodes=machine.nodes,
        )


def _describe_proof(machine: Machine) -> str:
    """The end of the sentence ``oslo and bergen are …``: one GPU, or likely one machine, and how this is known."""
    match machine.proof:
        case Proof.GPU:
            return f"one GPU, that is certain: nvidia-smi shows {machine.shared_mark} to each"
        case Proof.HOST_KEY:
            return f"most likely one machine: the same SSH host key, {machine.shared_mark}"
        case _:  # the store: this function is not called for a single node, whose proof is ``None``
            return "most likely one machine: one model store, the same in every model's time to the nanosecond"


def choose_node_to_keep(names: Sequence[str], specs: Mapping[str, NodeSpec], states: Mapping[str, NodeState]) -> str:
    """Returns the name of the best of several nodes with one GPU; of equal nodes the first.

    Nodes are compared by three questions: whether the node serves, whether its GPU is known, whether it needs no SSH.
    A question counts only between nodes that are equal in the questions before.
    """

    def rank(name: str) -> tuple[bool, bool, bool]:
        state = states[name]
        serves = state.backend.state is BackendPhase.UP
        shows_gpu = bool(hardware_uuids(state))
        needs_no_ssh = specs[name].ssh is None
        return serves, shows_gpu, needs_no_ssh

    return max(names, key=rank)  # ``max`` returns the first of equals


def find_duplicates(specs: Sequence[NodeSpec]) -> Iterator[list[str]]:
    """Yields groups of nodes (their names) that have the same address, user and candidates in mesh.yaml."""
    names_by_route: dict[object, list[str]] = {}
    for spec in specs:
        ssh = spec.ssh
        if ssh is None:
            login = None  # a direct node: its targets are the whole route
        elif not ssh.host and ssh.address_from is None:
            continue  # an alias, whose address is not in mesh.yaml
        else:
            login = (ssh.host.lower(), ssh.port, ssh.user, ssh.proxy_jump, ssh.address_from)
        route = (login, spec.backend.targets)
        names_by_route.setdefault(route, []).append(spec.name)
    for names in names_by_route.values():
        if len(names) > 1:
            yield names


# -- marks: what shows that nodes are one machine ----------------------------------------------------------------------


def hardware_uuids(node: NodeState) -> set[str]:
    """Returns the UUIDs that nvidia-smi shows, without UUIDs that a probe made up for a GPU whose UUID is unknown.

    A real UUID begins with ``GPU-`` or ``MIG-``, a UUID that a probe made up with ``unknown-`` (probes/smi_tables.py).
    """
    uuids = [gpu.uuid for gpu in node.gpus or ()]
    return {uuid for uuid in uuids if uuid.startswith(("GPU-", "MIG-")) and len(uuid) >= _MIN_UUID_LENGTH}


def store_fingerprint(catalog: Iterable[ModelInfo]) -> str | None:
    """Returns a fingerprint of a model store; ``None`` if another store could have the same fingerprint by chance.

    It is ``None`` for an empty store, for a store with a model whose time is unknown, and for a store in which no time
    has nanoseconds.
    """
    models = tuple(catalog)
    if not models or not all(model.modified_at for model in models):
        return None
    if not any(_HAS_NANOSECONDS.search(model.modified_at or "") for model in models):
        return None
    names_and_times = sorted((model.name, model.modified_at) for model in models)
    # ``surrogatepass``: a hostile name can hold half of a surrogate pair. 16 hex digits are 64 bits: enough for a mesh.
    return "store:" + hashlib.sha256(repr(names_and_times).encode(errors="surrogatepass")).hexdigest()[:16]


def _marks(node: NodeState, proof: Proof) -> Iterable[str]:
    """The node's UUIDs or fingerprints for this kind of proof. Nodes with a common mark may be one machine."""
    match proof:
        case Proof.GPU:
            return hardware_uuids(node)
        case Proof.HOST_KEY:
            # ``host_keys`` are those of the last host that was reached: only while the tunnel is up, it is this host.
            return node.tunnel.host_keys if node.tunnel.state is TunnelPhase.UP else ()
        case Proof.STORE:
            fingerprint = store_fingerprint(node.backend.catalog)
            return () if fingerprint is None else (fingerprint,)


def _group_by_mark(nodes: Sequence[NodeState], proof: Proof) -> Mapping[str, list[NodeState]]:
    """Groups the nodes by their marks for this kind of proof: GPU UUIDs, host keys, or fingerprints of model stores.

    A node is in the group of each of its marks.
    """
    holders: dict[str, list[NodeState]] = {}
    for node in nodes:
        for mark in sorted(_marks(node, proof)):
            holders.setdefault(mark, []).append(node)
    return holders


def _may_be_one_machine(node: NodeState, other: NodeState, proof: Proof) -> bool:
    """Whether this kind of proof joins two nodes that have a mark in common. It does not if each node may have its own
    GPUs. If the GPUs of both nodes are known, only a common GPU joins them: a common host key or store does not.
    """
    if _may_have_own_gpus(node, other):
        return False
    if proof is Proof.GPU:
        return True
    both_gpus_known = bool(hardware_uuids(node)) and bool(hardware_uuids(other))
    return not both_gpus_known


def _may_have_own_gpus(node: NodeState, other: NodeState) -> bool:
    """Whether the nodes may be two servers of one host, each with its own GPUs. Such servers count as two machines for
    the balancer. The answer is yes if the servers have different ports on the host, and the host has more than one GPU:
    servers that share the only GPU of a host are one machine. It is no if a port is unknown. Ports are known of SSH
    nodes only.
    """
    port, other_port = _server_port(node), _server_port(other)
    if port is None or other_port is None or port == other_port:
        return False
    # One answer of nvidia-smi is enough, because both nodes show the same host. No answer counts as several GPUs.
    host_has_single_gpu = any(len(state.gpus or ()) == 1 for state in (node, other))
    return not host_has_single_gpu


def _server_port(node: NodeState) -> str | None:
    """The port of the server in use on the node's host, as ``port:11434``; ``None`` if it is not known. The port of a
    direct node is never known, because the port at its address may only forward to another port of the host
    (``ssh -L 11435:localhost:11434``).
    """
    if node.tunnel.transport == "direct" or node.backend.url is None:
        return None
    for route in node.routes:
        if route.url == node.backend.url:
            return f"port:{urlsplit(route.target).port}"
    return None
