"""The rows of the comparison and the branches of the drawing that `audit` shows. Pure; audit_screen.py prints both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gpumesh.audit import Machine, Proof, find_machines
from gpumesh.audit.gpus import driver_matches, gpu_name_matches, vram_matches
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
    """One thing that is expected of a node (``what``), and what was found.

    With a finding, ``verdict`` is its code, ``severity`` its severity and ``todo`` its hint. Without a finding,
    ``verdict`` is a word such as ``AS_EXPECTED``, and the other two are ``None``.
    """

    node: str
    what: str
    expected: str
    found: str
    verdict: str
    severity: Severity | None = None
    todo: str | None = None


# The row (``what``) to which a finding of this code belongs.
_ROW_BY_CODE = {
    "hostname-differs": "hostname",
    "gpu-count": "GPUs",
    "gpu-missing": "GPUs",
    "gpu-differs": "GPU",
    "vram-differs": "VRAM",
    "driver-differs": "driver",
    "model-missing": "models",
}
# Other findings get rows of their own, whose names depend on how the code begins.
_ROW_BY_PREFIX = (
    (("gpu", "driver", "nvidia", "persistence"), "GPUs"),
    (("route", "backend-exposed"), "routes"),
    (("backend", "version"), "server"),
    (("model",), "models"),
    (("disk",), "disk"),
    (("same", "tunnel-duplicate"), "nodes"),
)
# Findings that belong to the row of the server, if the tunnel is up.
_SERVER_CODES = frozenset(
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
    """The rows of each node: its route, its server and each expectation; then the findings about several nodes."""
    states_by_name = {state.name: state for state in states}
    for spec in topology.nodes:
        if not spec.enabled:
            yield ComparisonRow(spec.name, ROUTE, describe_route(spec), UNKNOWN, "switched off")
            continue
        if spec.name not in states_by_name:
            yield ComparisonRow(spec.name, ROUTE, describe_route(spec), UNKNOWN, "not in the running mesh")
            continue
        node_findings = [finding for finding in findings if _only_node(finding) == spec.name]
        yield from _compare_node(spec, states_by_name[spec.name], node_findings)
    for finding in findings:
        if _only_node(finding) is None:
            yield _finding_row(", ".join(finding.nodes) or topology.name, finding)


def _only_node(finding: Finding) -> str | None:
    """The node of a finding about a single node, else ``None``."""
    return None if finding.nodes else finding.node


def _compare_node(spec: NodeSpec, state: NodeState, findings: Sequence[Finding]) -> Iterator[ComparisonRow]:
    up = state.tunnel.state is TunnelPhase.UP
    findings_left = {finding.code: finding for finding in findings}  # those that have no row yet
    rows = [_route_row(spec, state)]
    if up:
        rows += [_server_row(spec, state), *_expectation_rows(spec, state)]
    for row in rows:
        codes = [code for code in findings_left if _row_name_for_code(code, up) == row.what]
        if not codes:
            yield row
            continue
        finding = findings_left.pop(codes[0])
        # For a route and a server the finding's message says more than the state. Its message may begin with the URL,
        # which the row already shows as expected.
        message = finding.message.removeprefix(f"{row.expected}: ")
        found = message if row.what in (ROUTE, SERVER) else row.found
        yield _add_verdict(replace(row, found=found), finding)
    for finding in findings_left.values():
        yield _finding_row(spec.name, finding)


def _row_name_for_code(code: str, up: bool) -> str | None:
    """The row to which a finding of this code belongs; ``None`` if the finding gets a row of its own. ``up``: the
    node's tunnel is up."""
    if code in _ROW_BY_CODE:
        return _ROW_BY_CODE[code]
    if not up:
        return ROUTE
    return SERVER if code in _SERVER_CODES else None


def _finding_row(where: str, finding: Finding) -> ComparisonRow:
    """A row for a finding that belongs to no other row."""
    what = next((name for prefixes, name in _ROW_BY_PREFIX if finding.code.startswith(prefixes)), "node")
    return _add_verdict(ComparisonRow(where, what, UNKNOWN, finding.message, ""), finding)


def _add_verdict(row: ComparisonRow, finding: Finding) -> ComparisonRow:
    return replace(row, verdict=finding.code, severity=finding.severity, todo=finding.hint)


def _route_row(spec: NodeSpec, state: NodeState) -> ComparisonRow:
    tunnel = state.tunnel
    up = tunnel.state is TunnelPhase.UP
    found = f"up, {format_milliseconds(tunnel.rtt_ms)}" if up and tunnel.rtt_ms is not None else str(tunnel.state)
    verdict = AS_EXPECTED if up else state.reason or str(state.health)
    return ComparisonRow(spec.name, ROUTE, describe_route(spec), found, verdict)


def _server_row(spec: NodeSpec, state: NodeState) -> ComparisonRow:
    backend = state.backend
    expected = ", ".join(target.url for target in spec.backend.targets)
    if backend.state is not BackendPhase.UP:
        return ComparisonRow(spec.name, SERVER, expected, str(backend.state), NOT_KNOWN)
    current_route = route_in_use(state)
    found = f"{backend.kind} {backend.version or ''}".strip()
    if current_route is not None and len(spec.backend.targets) > 1:
        found += f" at {current_route.target}"
    if current_route is not None and current_route.latency_ms is not None:
        found += f", {format_milliseconds(current_route.latency_ms)}"
    return ComparisonRow(spec.name, SERVER, expected, found, AS_EXPECTED)


def _expectation_rows(spec: NodeSpec, state: NodeState) -> Iterator[ComparisonRow]:
    expect, gpus = spec.expect, state.gpus

    def row(what: str, expected: str, found: str | None, matches: bool) -> ComparisonRow:
        """``found`` is ``None`` where nothing is known, and empty where there is nothing."""
        if found is None:
            return ComparisonRow(spec.name, what, expected, UNKNOWN, NOT_KNOWN)
        return ComparisonRow(spec.name, what, expected, found or "none", AS_EXPECTED if matches else "differs")

    if expect.hostname is not None:
        found = state.host.hostname
        yield row("hostname", expect.hostname, found, found is not None and hostname_matches(expect.hostname, found))
    if expect.gpus is not None:
        count = None if gpus is None else str(len(gpus))
        yield row("GPUs", str(expect.gpus), count, gpus is not None and len(gpus) == expect.gpus)
    if expect.gpu is not None:
        matches = gpus is not None and bool(gpus) and all(gpu_name_matches(expect.gpu, gpu.name) for gpu in gpus)
        yield row(
            "GPU",
            short_gpu(expect.gpu),
            None if gpus is None else _join_distinct(short_gpu(gpu.name) for gpu in gpus),
            matches,
        )
    if expect.vram_mib is not None:
        sizes = (
            None
            if gpus is None
            else _join_distinct(f"{gpu.memory_total_mib} MiB" for gpu in gpus if gpu.memory_total_mib)
        )
        yield row("VRAM", f"{expect.vram_mib} MiB", sizes, bool(gpus) and vram_matches(expect.vram_mib, gpus or ()))
    if expect.driver is not None:
        driver = state.host.driver
        yield row("driver", expect.driver, driver, driver is not None and driver_matches(expect.driver, driver))
    if expect.models:
        models_known = state.backend.state is BackendPhase.UP
        present = {full_name(name) for name in state.backend.models}
        models = [name for name in expect.models if full_name(name) in present]
        yield row(
            "models",
            ", ".join(expect.models),
            ", ".join(models) if models_known else None,
            len(models) == len(expect.models),
        )


def _join_distinct(values: Iterator[str]) -> str:
    return ", ".join(sorted(set(values)))


def describe_route(spec: NodeSpec) -> str:
    """The route to the node, by mesh.yaml: its URLs or its SSH address."""
    ssh = spec.ssh
    if ssh is None:
        return ", ".join(target.url for target in spec.backend.targets)
    if ssh.address_from is not None:
        return f"ssh, address from {ssh.address_from.command[0]}"
    return f"ssh {ssh.user}@{ssh.host or ssh.alias}" + (f":{ssh.port}" if ssh.port != 22 else "")


# -- the drawing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RouteLine:
    """One line of the drawing below a machine. ``dim``: the route is not in use. An empty ``node``: the line is another
    route of the node above."""

    node: str
    route: str
    remark: str = ""
    dim: bool = False


@dataclass(frozen=True, slots=True)
class MachineBranch:
    """A machine with its routes, or all nodes that are not reached. ``remark``: the proof that the nodes are one
    machine."""

    title: str
    lines: tuple[RouteLine, ...]
    remark: str = ""
    reached: bool = True


def draw_topology(topology: Topology, states: Sequence[NodeState]) -> tuple[MachineBranch, ...]:
    """The machines with the routes that lead to them, then the nodes that are not reached."""
    specs = {spec.name: spec for spec in topology.nodes if spec.enabled}
    states_by_name = {state.name: state for state in states if state.name in specs}
    reached = [state for state in states_by_name.values() if state.tunnel.state is TunnelPhase.UP]
    branches = [_machine_branch(machine, specs, states_by_name) for machine in find_machines(reached)]
    not_reached = [state for state in states_by_name.values() if state.tunnel.state is not TunnelPhase.UP]
    if not_reached:
        lines = tuple(
            RouteLine(state.name, describe_route(specs[state.name]), state.reason or "", dim=True)
            for state in not_reached
        )
        branches.append(MachineBranch("not reached", lines, reached=False))
    return tuple(branches)


_PROOF_REMARKS = {
    Proof.GPU: "one GPU: certain, by its UUID",
    Proof.HOST_KEY: "most likely one machine, by its SSH host key",
    Proof.STORE: "most likely one machine, by its model store",
}


def _machine_branch(machine: Machine, specs: Mapping[str, NodeSpec], states: Mapping[str, NodeState]) -> MachineBranch:
    hosts = sorted({name for node in machine.nodes if (name := states[node].host.hostname) is not None})
    title = _describe_gpus(machine.gpus, [states[node] for node in machine.nodes])
    if hosts:
        title += f" on {', '.join(hosts)}"
    lines = [line for node in machine.nodes for line in _route_lines(specs[node], states[node])]
    return MachineBranch(title, tuple(lines), "" if machine.proof is None else _PROOF_REMARKS[machine.proof])


def _describe_gpus(gpus: Sequence[GpuState], nodes: Sequence[NodeState]) -> str:
    if not gpus:
        return "no GPU" if any(node.gpus is not None for node in nodes) else "GPU not known"
    kinds: dict[str, list[GpuState]] = {}
    for gpu in gpus:
        size = "" if gpu.memory_total_mib is None else f", {format_gib(gpu.memory_total_mib)} GiB"
        kinds.setdefault(f"{short_gpu(gpu.name)}{size}", []).append(gpu)
    parts = [kind if len(alike) == 1 else f"{len(alike)} x {kind}" for kind, alike in kinds.items()]
    return f"{' + '.join(parts)} ({gpus[0].uuid[:12]}…)" if len(gpus) == 1 else " + ".join(parts)


def _route_lines(spec: NodeSpec, state: NodeState) -> Iterator[RouteLine]:
    routes = state.routes
    current_route = route_in_use(state)
    name = spec.name
    for route in sorted(routes, key=lambda route: route is not current_route):
        yield RouteLine(
            name,
            _describe_route_state(spec, route),
            _route_remark(route, current_route, state),
            dim=route is not current_route,
        )
        name = ""
    if not routes:
        yield RouteLine(spec.name, describe_route(spec))


def _describe_route_state(spec: NodeSpec, route: RouteState) -> str:
    if spec.ssh is None or route.offered:
        return route.target + (" without SSH" if route.offered else "")
    return f"{describe_route(spec)} → {route.target}"


def _route_remark(route: RouteState, current_route: RouteState | None, state: NodeState) -> str:
    parts = []
    if route.state is BackendPhase.DOWN:
        parts.append("does not serve")
    elif route is current_route:
        parts.append(
            format_milliseconds(route.latency_ms if route.latency_ms is not None else state.backend.latency_ms)
        )
    else:
        parts.append("not in use")
        if route.latency_ms is not None:
            parts.append(format_milliseconds(route.latency_ms))
    return ", ".join(parts)
