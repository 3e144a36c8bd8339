"""What a running mesh can take over from a changed mesh.yaml, and what takes effect after a restart only. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gpumesh.config.comparison import Differences, KeyChange, compare_topologies
from gpumesh.text.addresses import is_loopback
from gpumesh.text.quoting import paste_command
from gpumesh.topology import GatewaySpec, Topology


@dataclass(frozen=True, slots=True)
class LivePlan:
    """``topology`` is the file's, with the running mesh's own values for what it cannot change. ``differences`` are
    what changes; ``after_restart`` is what the file says in addition."""

    topology: Topology
    differences: Differences
    after_restart: tuple[KeyChange, ...] = ()


@dataclass(frozen=True, slots=True)
class LeavingNode:
    """A node whose tunnel closes as soon as its ``in_flight`` requests have ended. It was removed from mesh.yaml, or
    another tunnel has taken its place."""

    name: str
    in_flight: int


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """What a reload has done.

    ``applied``: what has changed in the running mesh; false if nothing has. ``after_restart``: what the file says and
    takes effect after a restart only. ``not_opened``: nodes of the file that the mesh leaves alone, because `gpumesh
    up` named other nodes. ``reopened``: the nodes that get a new tunnel. ``leaving``: the nodes that still had requests
    in flight then. ``age_s``: the mesh had taken the file over by itself so many seconds before; 0: it did so now."""

    applied: Differences = field(default_factory=Differences)
    after_restart: tuple[KeyChange, ...] = ()
    not_opened: tuple[str, ...] = ()
    reopened: tuple[str, ...] = ()
    leaving: tuple[LeavingNode, ...] = ()
    age_s: float = 0.0

    def lines(self) -> list[str]:
        """What has changed, a line for each node, model, pool and key."""
        applied, leaving = self.applied, {node.name: node.in_flight for node in self.leaving}
        lines = [f"{name}: added" for name in applied.added]
        lines += [f"{name}: removed{_describe_leaving(leaving.get(name, 0))}" for name in applied.removed]
        for node in applied.changed:
            tunnel = "; opened anew" if node.name in self.reopened else ""
            lines.append(f"{node}{tunnel}{_describe_leaving(leaving.get(node.name, 0))}")
        lines += [f"model {name}: added" for name in applied.models_added]
        lines += [f"model {name}: removed" for name in applied.models_removed]
        lines += [f"model {model}" for model in applied.models_changed]
        for name in applied.pools_added:
            lines.append(f"pool {name}: added; {paste_command('gpumesh pool up {POOL}', POOL=name)} starts it")
        lines += [f"pool {name}: removed" for name in applied.pools_removed]
        lines += [f"pool {pool}; takes effect at its next start" for pool in applied.pools_changed]
        lines += [str(change) for change in applied.mesh_keys]
        lines += [f"{change}: takes effect after a restart" for change in self.after_restart]
        lines += [f"{name}: left alone, because `gpumesh up` named other nodes" for name in self.not_opened]
        return lines or ["nothing has changed"]


def _describe_leaving(in_flight: int) -> str:
    if not in_flight:
        return ""
    requests = "1 request still runs" if in_flight == 1 else f"{in_flight} requests still run"
    return f"; {requests} over its old tunnel"


def plan_live_changes(running: Topology, current: Topology) -> LivePlan:
    """Decides what a mesh that runs with ``running`` does when its file says ``current``."""
    live = replace(current, redis=running.redis, gateway=_keep_address(running.gateway, current.gateway))
    remaining = compare_topologies(live, current).mesh_keys
    return LivePlan(live, compare_topologies(running, live), remaining)


def _keep_address(running: GatewaySpec, current: GatewaySpec) -> GatewaySpec:
    """The new settings of the gateway at its old address. If other machines can reach this address and the new
    settings need no key, the old keys stay too: without a key everybody there could use the mesh."""
    live = replace(current, host=running.host, port=running.port, socket=running.socket)
    is_open = live.host is not None and not is_loopback(live.host)
    if is_open and not live.needs_key:
        live = replace(live, api_key_env=running.api_key_env, keys=running.keys)
    return live
