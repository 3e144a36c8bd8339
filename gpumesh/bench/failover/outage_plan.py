"""Which node is taken out of service, and how. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.errors import UsageError, unknown_node
from gpumesh.mesh.outages.outage import Outage, OutageKind
from gpumesh.state import MeshState, NodeState


@dataclass(frozen=True, slots=True)
class OutagePlan:
    """What a person has asked for. ``kind``: ``None`` is a tunnel if there is one, else a drain. ``node``: the node;
    ``None`` is the busiest one. The commands are for ``SERVER``."""

    kind: OutageKind | None = None
    node: str | None = None
    stop_command: str | None = None
    start_command: str | None = None

    def check(self) -> None:
        """Raises UsageError if the commands do not fit the kind."""
        has_command = self.stop_command is not None or self.start_command is not None
        if self.kind is OutageKind.SERVER and (self.stop_command is None or self.start_command is None):
            raise UsageError(
                "--by server needs --stop-command and --start-command",
                hint="e.g. --stop-command 'systemctl stop ollama' --start-command 'systemctl start ollama'",
            )
        if self.kind is not OutageKind.SERVER and has_command:
            raise UsageError("--stop-command and --start-command are for --by server")


def plan_outage(plan: OutagePlan, state: MeshState, nodes: Sequence[str], *, embedded: bool) -> Outage:
    """How a node is taken out of service.

    ``nodes`` are the measured nodes. ``embedded``: the mesh runs in the measuring process. Raises UsageError if that
    cannot be done here.
    """
    plan.check()
    if plan.node is not None and plan.node not in nodes:
        raise unknown_node(plan.node, nodes)
    kind = plan.kind
    if kind is None:
        kind = OutageKind.TUNNEL if _candidates(plan, state, nodes, OutageKind.TUNNEL) else OutageKind.DRAIN
    if not _candidates(plan, state, nodes, kind):
        raise UsageError(
            "there is no tunnel to close: these nodes are reached without SSH", hint="add `--by drain` or `--by server`"
        )
    if kind is OutageKind.SERVER and embedded:
        raise UsageError(
            "--by server needs a running mesh, which starts the server again however this ends", hint="`gpumesh up -d`"
        )
    return Outage(kind, plan.stop_command, plan.start_command)


def choose_node(plan: OutagePlan, kind: OutageKind, state: MeshState, nodes: Sequence[str]) -> str:
    """The node that is taken out: the one with the most requests in flight, if the plan names none."""
    candidates = _candidates(plan, state, nodes, kind)
    if not candidates:
        raise UsageError("no node that could be taken out of service is left")
    return max(candidates, key=lambda node: node.load.in_flight).name


def _candidates(plan: OutagePlan, state: MeshState, nodes: Sequence[str], kind: OutageKind) -> list[NodeState]:
    """The measured nodes that can be taken out of service in this way."""
    return [
        node
        for node in state.nodes
        if node.name in nodes
        and plan.node in (None, node.name)
        and (kind is not OutageKind.TUNNEL or node.tunnel.transport != "direct")
    ]
