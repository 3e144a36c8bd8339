"""What `audit` says as rows, and the real topology as a drawing. Pure; audit_screen.py puts both on the screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gpumesh.audit import Machine, Proof, find_machines
from gpumesh.audit.gpus import gpu_name_matches, vram_matches
from gpumesh.audit.identity import hostname_matches
from gpumesh.audit.routes import route_in_use
from gpumesh.cli.views.figures import UNKNOWN, format_gib, format_milliseconds, short_gpu
from gpumesh.model_names import full_name
from gpumesh.state import BackendPhase, Finding, GpuState, NodeState, RouteState, Severity, TunnelPhase
from gpumesh.topology import NodeSpec, Topology

AS_EXPECTED = "as expected"
NOT_KNOWN = "not known"
ROUTE, SERVER = "route", "server"


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """``severity`` is that of the finding whose code ``verdict`` then is; ``None`` where all is as it should be or
    nothing is known. ``todo`` is what to do."""

    node: str
    what: str
    expected: str
    found: str
    verdict: str
    severity: Severity | None = None
    todo: str | None = None


# Which row a finding belongs to; the others get rows of their own.
_ROW_OF = {
    "hostname-differs": "hostname",
    "gpu-count": "GPUs",
    "gpu-missing": "GPUs",
    "gpu-differs": "GPU",
    "vram-differs": "VRAM",
    "driver-differs": "driver",
    "model-missing": "models",
}
# The others' rows, by how their codes begin.
_FAMILIES = (
    (("gpu", "driver", "nvidia", "persistence"), "GPUs"),
    (("route", "backend-exposed"), "routes"),
    (("backend", "version"), "server"),
    (("model",), "models"),
    (("disk",), "disk"),
    (("same", "tunnel-duplicate"), "nodes"),
)
_OF_SERVER = frozenset(
    {
        "answer-broken",
        "backend-down",
        "host-refused",
        "key-refused",
        "models-too-many",
        "redirected",
        "secret-missing",
        "tls-refused",
        "wrong-scheme",
        "wrong-server",
    }
)


def compare_nodes(
    topology: Topology, states: Sequence[NodeState], findings: Sequence[Finding]
) -> Iterator[ComparisonRow]:
    """For each node how it is reached, its server and what is expected of it; then whatever else was found."""
    known = {state.name: state for state in states}
    for spec in topology.nodes:
        if not spec.enabled:
            yield ComparisonRow(spec.name, ROUTE, describe_route(spec), UNKNOWN, "switched off")
            continue
        if spec.name not in known:
            yield ComparisonRow(spec.name, ROUTE, describe_route(spec), UNKNOWN, "not in the running mesh")
            continue
        yield from _of_node(spec, known[spec.name], [each for each in findings if _about(each) == spec.name])
    for finding in findings:
        if _about(finding) is None:
            where = ", ".join(finding.nodes) or topology.name
            yield _told(ComparisonRow(where, _family(finding.code), UNKNOWN, finding.message, ""), finding)


def _family(code: str) -> str:
    return next((family for starts, family in _FAMILIES if code.startswith(starts)), "node")


def _about(finding: Finding) -> str | None:
    """The node that it is about alone."""
    return None if finding.nodes else finding.node


def _of_node(spec: NodeSpec, state: NodeState, findings: Sequence[Finding]) -> Iterator[ComparisonRow]:
    up = state.tunnel.state is TunnelPhase.UP
    left = {finding.code: finding for finding in findings}
    made = [_route(spec, state)]
    if up:
        made += [_server(spec, state), *_expectations(spec, state)]
    for row in made:
        here = [code for code in left if (_ROW_OF.get(code) or _place(code, up)) == row.what]
        if not here:
            yield row
            continue
        finding = left.pop(here[0])
        # Of how it is reached and of the server the finding says more than a word of state.
        said = finding.message.removeprefix(f"{row.expected}: ")  # where: that stands beside it
        found = said if row.what in (ROUTE, SERVER) else row.found
        yield _told(replace(row, found=found), finding)
    for finding in left.values():
        yield _told(ComparisonRow(spec.name, _family(finding.code), UNKNOWN, finding.message, ""), finding)


def _place(code: str, up: bool) -> str | None:
    if not up:
        return ROUTE
    return SERVER if code in _OF_SERVER else None


def _told(row: ComparisonRow, finding: Finding) -> ComparisonRow:
    return replace(row, verdict=finding.code, severity=finding.severity, todo=finding.hint)


def _route(spec: NodeSpec, state: NodeState) -> ComparisonRow:
    tunnel = state.tunnel
    up = tunnel.state is TunnelPhase.UP
    found = f"up, {format_milliseconds(tunnel.rtt_ms)}" if up and tunnel.rtt_ms is not None else str(tunnel.state)
    verdict = AS_EXPECTED if up else state.reason or str(state.health)
    return ComparisonRow(spec.name, ROUTE, describe_route(spec), found, verdict)


def _server(spec: NodeSpec, state: NodeState) -> ComparisonRow:
    backend = state.backend
    expected = ", ".join(target.url for target in spec.backend.targets)
    if backend.state is not BackendPhase.UP:
        return ComparisonRow(spec.name, SERVER, expected, str(backend.state), NOT_KNOWN)
    used = route_in_use(state)
    found = f"{backend.kind} {backend.version or ''}".strip()
    if used is not None and len(spec.backend.targets) > 1:
        found += f" at {used.target}"
    if used is not None and used.latency_ms is not None:
        found += f", {format_milliseconds(used.latency_ms)}"
    return ComparisonRow(spec.name, SERVER, expected, found, AS_EXPECTED)


def _expectations(spec: NodeSpec, state: NodeState) -> Iterator[ComparisonRow]:
    expect, gpus = spec.expect, state.gpus

    def row(what: str, expected: str, found: str | None, same: bool) -> ComparisonRow:
        verdict = NOT_KNOWN if found is None else AS_EXPECTED if same else "differs"
        return ComparisonRow(spec.name, what, expected, UNKNOWN if found is None else found or "none", verdict)

    if expect.hostname is not None:
        found = state.host.hostname
        yield row("hostname", expect.hostname, found, found is not None and hostname_matches(expect.hostname, found))
    if expect.gpus is not None:
        count = None if gpus is None else str(len(gpus))
        yield row("GPUs", str(expect.gpus), count, gpus is not None and len(gpus) == expect.gpus)
    if expect.gpu is not None:
        same = gpus is not None and bool(gpus) and all(gpu_name_matches(expect.gpu, gpu.name) for gpu in gpus)
        yield row(
            "GPU", short_gpu(expect.gpu), None if gpus is None else _all(short_gpu(gpu.name) for gpu in gpus), same
        )
    if expect.vram_mib is not None:
        sizes = None if gpus is None else _all(f"{gpu.memory_total_mib} MiB" for gpu in gpus if gpu.memory_total_mib)
        yield row("VRAM", f"{expect.vram_mib} MiB", sizes, bool(gpus) and vram_matches(expect.vram_mib, gpus or ()))
    if expect.driver is not None:
        driver = state.host.driver
        yield row("driver", expect.driver, driver, driver is not None and f"{driver}.".startswith(f"{expect.driver}."))
    if expect.models:
        known = state.backend.state is BackendPhase.UP
        there = {full_name(name) for name in state.backend.models}
        found_ = [name for name in expect.models if full_name(name) in there]
        yield row(
            "models", ", ".join(expect.models), ", ".join(found_) if known else None, len(found_) == len(expect.models)
        )


def _all(found: Iterator[str]) -> str:
    return ", ".join(sorted(set(found)))


def describe_route(spec: NodeSpec) -> str:
    """How mesh.yaml says that a node is reached."""
    ssh = spec.ssh
    if ssh is None:
        return ", ".join(target.url for target in spec.backend.targets)
    if ssh.address_from is not None:
        return f"ssh, address from {ssh.address_from.command[0]}"
    return f"ssh {ssh.user}@{ssh.host or ssh.alias}" + (f":{ssh.port}" if ssh.port != 22 else "")


# -- the drawing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RouteLine:
    """One line of the drawing below a machine. ``dim`` for what is not in use."""

    node: str
    route: str
    remark: str = ""
    dim: bool = False


@dataclass(frozen=True, slots=True)
class MachineBranch:
    """A machine, or those nodes of which none is known. ``remark``: how it is known that its nodes are one."""

    title: str
    lines: tuple[RouteLine, ...]
    remark: str = ""
    reached: bool = True


def draw_topology(topology: Topology, states: Sequence[NodeState]) -> tuple[MachineBranch, ...]:
    """Which node reaches which GPU by which way: machines first, then what is not reached."""
    specs = {spec.name: spec for spec in topology.nodes if spec.enabled}
    known = {state.name: state for state in states if state.name in specs}
    reached = [state for state in known.values() if state.tunnel.state is TunnelPhase.UP]
    branches = [_machine(machine, specs, known) for machine in find_machines(reached)]
    away = [state for state in known.values() if state.tunnel.state is not TunnelPhase.UP]
    if away:
        twigs = tuple(
            RouteLine(state.name, describe_route(specs[state.name]), state.reason or "", dim=True) for state in away
        )
        branches.append(MachineBranch("not reached", twigs, reached=False))
    return tuple(branches)


_HOW = {
    Proof.GPU: "one GPU: certain, by its UUID",
    Proof.HOST_KEY: "most likely one machine, by its SSH host key",
    Proof.STORE: "most likely one machine, by its model store",
}


def _machine(machine: Machine, specs: Mapping[str, NodeSpec], states: Mapping[str, NodeState]) -> MachineBranch:
    hosts = sorted({name for node in machine.nodes if (name := states[node].host.hostname) is not None})
    title = _gpus(machine.gpus, [states[node] for node in machine.nodes])
    if hosts:
        title += f" on {', '.join(hosts)}"
    twigs = [twig for node in machine.nodes for twig in _twigs(specs[node], states[node])]
    return MachineBranch(title, tuple(twigs), "" if machine.proof is None else _HOW[machine.proof])


def _gpus(gpus: Sequence[GpuState], nodes: Sequence[NodeState]) -> str:
    if not gpus:
        return "no GPU" if any(node.gpus is not None for node in nodes) else "GPU not known"
    kinds: dict[str, list[GpuState]] = {}
    for gpu in gpus:
        size = "" if gpu.memory_total_mib is None else f", {format_gib(gpu.memory_total_mib)} GiB"
        kinds.setdefault(f"{short_gpu(gpu.name)}{size}", []).append(gpu)
    said = [kind if len(alike) == 1 else f"{len(alike)} x {kind}" for kind, alike in kinds.items()]
    return f"{' + '.join(said)} ({gpus[0].uuid[:12]}…)" if len(gpus) == 1 else " + ".join(said)


def _twigs(spec: NodeSpec, state: NodeState) -> Iterator[RouteLine]:
    routes = state.routes
    used = route_in_use(state)
    first = spec.name
    for route in sorted(routes, key=lambda route: route is not used):
        yield RouteLine(first, _way(spec, route), _remark(route, used, state), dim=route is not used)
        first = ""
    if not routes:
        yield RouteLine(spec.name, describe_route(spec))


def _way(spec: NodeSpec, route: RouteState) -> str:
    if spec.ssh is None or route.offered:
        return route.target + (" without SSH" if route.offered else "")
    return f"{describe_route(spec)} → {route.target}"


def _remark(route: RouteState, used: RouteState | None, state: NodeState) -> str:
    said = []
    if route.state is BackendPhase.DOWN:
        said.append("does not serve")
    elif route is used:
        said.append(format_milliseconds(route.latency_ms if route.latency_ms is not None else state.backend.latency_ms))
    else:
        said.append("not in use")
        if route.latency_ms is not None:
            said.append(format_milliseconds(route.latency_ms))
    return ", ".join(said)
