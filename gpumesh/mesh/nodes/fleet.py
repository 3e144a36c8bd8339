"""``Fleet``: all nodes of a running mesh, by name; it computes their candidates, groups and loads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace as replace_state
from urllib.parse import urlsplit

from msgspec.structs import replace

from gpumesh import audit, config
from gpumesh.balancer.account import GpuGroup
from gpumesh.balancer.base import Candidate, Demand
from gpumesh.balancer.breaker import ModelFault
from gpumesh.balancer.outcomes import Blame, Outcome
from gpumesh.balancer.select import allows_node, has_model, no_node_error
from gpumesh.errors import GPUMeshError, ModelMissing, NoNodeError, UsageError
from gpumesh.mesh.nodes.forecast_record import ForecastRecord
from gpumesh.mesh.nodes.model_findings import describe_model_fault
from gpumesh.mesh.nodes.node import Node
from gpumesh.state import Finding, NodeState, Severity
from gpumesh.text.model_names import full_name
from gpumesh.tunnels.base import Tunnel


class Fleet:
    """The nodes of a mesh. Iterating over it yields the nodes in the order of mesh.yaml. ``fleet[name]`` raises
    KeyError for a name that mesh.yaml does not have."""

    def __init__(self, nodes: Iterable[Node], *, clock: Callable[[], float]) -> None:
        self._nodes = {node.name: node for node in nodes}
        self._clock = clock
        self.leaving: set[Node] = set()
        """The nodes that are not in the mesh any more, and whose last requests have not ended yet."""
        self.pools_away: Mapping[str, str] = {}
        """Why the models of pools are not served now, by their full names: "the pool …, which has the model …"."""

    def __repr__(self) -> str:
        reachable = sum(node.reachable for node in self)
        return f"<Fleet {len(self._nodes)} nodes, {reachable} reachable>"

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    def get(self, name: str) -> Node | None:
        return self._nodes.get(name)

    def find_node(self, name: str) -> Node:
        """Returns the node. Raises UsageError for a node that mesh.yaml does not have."""
        self.require_known(name)
        return self._nodes[name]

    def require_known(self, name: str | None) -> str | None:
        """Returns ``name`` as it is, also ``None``, which stands for any node. Raises UsageError for a node that
        mesh.yaml does not have."""
        if name is not None and name not in self._nodes:
            raise UsageError(f"there is no node {name!r}", hint=f"the nodes are: {', '.join(self._nodes)}")
        return name

    def find_tunnel(self, name: str) -> Tunnel:
        """Returns the node's tunnel. Raises UsageError for a node that mesh.yaml does not have or that is disabled in
        it."""
        tunnel = self.find_node(name).tunnel
        if tunnel is None:
            raise UsageError(f"node {name!r} is disabled in mesh.yaml")
        return tunnel

    def drain(self, name: str) -> None:
        """Sends no new requests to the node, until ``resume``. Raises UsageError for an unknown node."""
        node = self.find_node(name)
        node.role.drained = True
        node.announce_change()

    def resume(self, name: str) -> None:
        """Ends the draining of the node, whoever asked for it. Raises UsageError for an unknown node."""
        node = self.find_node(name)
        node.role.drained = False
        node.role.drain_holds.clear()
        node.announce_change()

    def leaving_findings(self) -> list[Finding]:
        """A remark for each node that has left the mesh, and whose last requests have not ended yet."""
        findings = []
        for name, count in sorted((node.name, node.ledger.held) for node in self.leaving if node.ledger.held):
            requests = "1 request still runs" if count == 1 else f"{count} requests still run"
            message = f"{requests} over the old tunnel of {name}, which then closes"
            findings.append(Finding("node-leaving", Severity.INFO, None, message, "nothing has to be done"))
        return findings

    def candidates(self, *, despite_breaker: bool = False) -> list[Candidate]:
        """All nodes as the balancer sees them now. ``despite_breaker``: as in ``SnapshotBuilder.candidate``."""
        now = self._clock()
        return [node.candidate(now, despite_breaker=despite_breaker) for node in self._nodes.values()]

    def replace_nodes(self, nodes: Iterable[Node]) -> None:
        """Takes over other nodes, in the order of mesh.yaml."""
        self._nodes = {node.name: node for node in nodes}

    def is_renamed(self, model: str) -> bool:
        """Whether the server of any node must be asked for this model under another name."""
        return any(node.server_name(model) is not None for node in self._nodes.values())

    def explain_no_node(self, demand: Demand, lacking: Collection[str] = ()) -> GPUMeshError:
        """Builds the error that tells why no node can serve this demand, with the reason for each node that the demand
        allows. ``lacking``: nodes that have just answered that they do not have the model, whatever they list."""
        candidates = [
            replace(candidate, models=frozenset()) if candidate.name in lacking else candidate
            for candidate in self.candidates()
        ]
        error = no_node_error(candidates, demand)
        if demand.model is not None:
            away = self.pools_away.get(full_name(demand.model))
            if away is not None and not self.lists_model(demand.model):
                return NoNodeError(away, hint="`gpumesh pool status` shows it, and what it waits for")
        if type(error) is not NoNodeError:  # ModelMissing: that no usable node has the model is the whole reason
            return error
        allowed = [candidate for candidate in candidates if allows_node(demand, candidate.name)]
        faults: dict[str, ModelFault] = {}  # by node
        if demand.model is not None:
            faults = self._find_model_faults(allowed, demand.model)
            enabled = [candidate for candidate in allowed if candidate.enabled]
            listing = {candidate.name for candidate in enabled if has_model(candidate, demand.model)}
            missing = [name for name, fault in faults.items() if fault.blame is Blame.MISSING_MODEL]
            # Whether all nodes that list the model have answered that they do not have it.
            no_node_has_model = bool(listing) and listing.issubset(missing)
            if no_node_has_model:
                verbs = ("lists", "answers") if len(missing) == 1 else ("list", "answer")
                names = ", ".join(missing)
                hint = f"{names} {verbs[0]} it, but {verbs[1]} that it is not there: pull it again there"
                return ModelMissing(demand.model, hint=hint)
        states = [self[candidate.name].state(queued=0) for candidate in allowed]
        reasons = "; ".join(f"{state.name}: {_describe_reason(state, faults.get(state.name))}" for state in states)
        explained = NoNodeError(f"{error.message} ({reasons})" if reasons else error.message, hint=error.hint)
        trials = [self[candidate.name].next_trial_s(demand.model) for candidate in allowed]
        explained.retry_after_s = min((trial_s for trial_s in trials if trial_s is not None), default=None)
        return explained

    def lists_model(self, model: str) -> bool:
        """Whether the server of any node lists this model."""
        return any(node.account.models is not None and has_model(node.account, model) for node in self)

    def _find_model_faults(self, candidates: Iterable[Candidate], model: str) -> dict[str, ModelFault]:
        """The faults of this model on these nodes, by node. Nodes on which the model has no fault are left out."""
        faults = {candidate.name: self[candidate.name].find_model_fault(model) for candidate in candidates}
        return {name: fault for name, fault in faults.items() if fault is not None}

    def regroup(self) -> None:
        """Puts nodes that share a GPU into one group: the balancer treats a group as one node. Requests that still run
        on a node that is leaving take slots of the group too.

        A pool computes on the GPUs of all its members: its requests count for each of them, and theirs for the pool.
        The members themselves stay apart."""
        # A name that no node can have: a leaving node may have a successor of its own name.
        leaving = {f" leaving {index}": node for index, node in enumerate(self.leaving)}
        by_name = {**self._nodes, **leaving}
        pools = {name: node for name, node in by_name.items() if node.spec.pool_members}
        by_name = {name: node for name, node in by_name.items() if name not in pools}
        names = audit.gpu_groups([replace_state(node.state(queued=0), name=name) for name, node in by_name.items()])
        members: dict[str, list[Node]] = {}
        for name, node in by_name.items():  # a node that shares no GPU is a group of its own, by its own name
            members.setdefault(names.get(name, name), []).append(node)
        for name, nodes in members.items():
            users = [pool for pool in pools.values() if any(node.name in pool.spec.pool_members for node in nodes)]
            group = GpuGroup(name, [node.account for node in (*nodes, *users)])
            for node in nodes:
                node.account.group = group
        for name, pool in pools.items():
            used = [
                node for nodes in members.values() if pool.account in nodes[0].account.group.accounts for node in nodes
            ]
            pool.account.group = GpuGroup(name, [node.account for node in (pool, *used)])
        self.update_other_loads()

    def update_other_loads(self) -> None:
        """Tells the accounts how many requests other gateways have in flight."""
        for node in self:
            node.update_other_loads()

    @property
    def attempt_outcomes(self) -> dict[str, Mapping[Outcome, int]]:
        """For each node, the number of attempts that took a slot there, by the outcome of the attempt."""
        return {node.name: node.attempt_outcomes for node in self}

    @property
    def forecast_records(self) -> dict[str, ForecastRecord]:
        """For each node, what was forecast for its requests, and how long they have taken."""
        return {node.name: node.ledger.forecasts for node in self}

    def local_ports(self) -> frozenset[int]:
        """The ports of this machine on which a node's server answers: the local ends of tunnels, and the ports of
        servers that run on this machine.

        A web page from such a port was written by a node's host, although its address is one of this machine. So the
        gateway does not trust such a page as one of this machine."""
        tunnels = [node.tunnel for node in (*self, *self.leaving) if node.tunnel is not None]
        urls = [urlsplit(url) for tunnel in tunnels for url in tunnel.urls.values()]
        local_ports = [url.port for url in urls if config.is_loopback(url.hostname or "")]
        return frozenset(port for port in local_ports if port is not None)


def _describe_reason(state: NodeState, fault: ModelFault | None) -> str:
    """Why the node does not serve a request. ``fault``: that of the demanded model on this node; ``None``: it has none.
    A reason that concerns the whole node comes first."""
    if state.reason is None and fault is not None:
        return describe_model_fault(fault)
    return state.reason or "no answer yet"
