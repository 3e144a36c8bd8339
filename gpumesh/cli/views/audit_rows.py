"""The rows of the comparison and the branches of the drawing that `audit` shows. Pure; audit_screen.py prints both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gpumesh.audit import Machine, Proof, find_machines
from gpumesh.audit.gpus import driver_matches, gpu_name_matches, vram_matches
from gpumesh.audit.identity import hostname_matches
from gpumesh.audit.routes import route_in_use
from gpumesh.cli.views.figures import UNKNOWN, format_gib, format_milliseconds, short_gpu
from gpumesh.state import BackendPhase, Finding, GpuState, NodeState, RouteState, Severity, TunnelPhase
from gpumesh.text.model_names import full_name
from gpumesh.topology import NodeSpec, Topology

AS_EXPECTED = "as expected"
NOT_KNOWN = "not known"
ROUTE, SERVER = "route", "server"


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """A row of the comparison: what mesh.yaml expects of a node, and what was found. ``name`` is that of the property.

    With a finding, ``verdict`` is the finding's code, ``severity`` its severity and ``todo`` its hint. Without a
    finding, ``verdict`` is a word such as ``AS_EXPECTED``, and ``severity`` and ``todo`` are ``None``.
    """

    node: str
    name: str
    expected: str
    found: str
    verdict: str
    severity: Severity | None = None
    todo: str | None = None


# By the code of a finding: the name of the row to which the finding belongs.
_ROW_BY_CODE = {
    "hostname-differs": "hostname",
    "gpu-count": "GPUs",
    "gpu-missing": "GPUs",
    "gpu-differs": "GPU",
    "vram-differs": "VRAM",
    "driver-differs": "driver",
    "model-missing": "models",
}
# Other findings get rows of their own. If their code begins with one of these texts, the row has the name after them.
_ROW_BY_PREFIX = (
    (("gpu", "driver", "nvidia", "persistence"), "GPUs"),
    (("route", "backend-exposed"), "routes"),
    (("backend", "version"), "server"),
    (("model",), "models"),
    (("disk",), "disk"),
    (("same", "tunnel-duplicate"), "nodes"),
    (("config-changed", "config-invalid"), "mesh.yaml"),
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
    """Yields the rows of each node (its route, its server and each expectation), then a row for each finding about
    several nodes or about none."""
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
    return None if finding.nodes else finding.node  # ``nodes`` is set only if the finding is about several


def _compare_node(spec: NodeSpec, state: NodeState, findings: Sequence[Finding]) -> Iterator[ComparisonRow]:
    """Yields the rows of one node. Each row takes the first finding that belongs to it; the other findings follow as
    rows of their own."""
    tunnel_is_up = state.tunnel.state is TunnelPhase.UP
    findings_without_row = {finding.code: finding for finding in findings}
    rows = [_route_row(spec, state)]
    if tunnel_is_up:
        rows += [_server_row(spec, state), *_expectation_rows(spec, state)]
    for row in rows:
        codes = [code for code in findings_without_row if _row_name_for_code(code, tunnel_is_up) == row.name]
        if not codes:
            yield row
            continue
        first_code, *_ = codes
        finding = findings_without_row.pop(first_code)
        # For a route and a server the message of the finding says more than ``row.found``. The message may begin with
        # the URL, which the row already shows as expected.
        message = finding.message.removeprefix(f"{row.expected}: ")
        found = message if row.name in (ROUTE, SERVER) else row.found
        yield _add_verdict(replace(row, found=found), finding)
    for finding in findings_without_row.values():
        yield _finding_row(spec.name, finding)


def _row_name_for_code(code: str, tunnel_is_up: bool) -> str | None:
    """The row to which a finding of this code belongs; ``None`` if the finding gets a row of its own."""
    if code in _ROW_BY_CODE:
        return _ROW_BY_CODE[code]
    if not tunnel_is_up:  # then the node has no other row
        return ROUTE
    return SERVER if code in _SERVER_CODES else None


def _finding_row(node: str, finding: Finding) -> ComparisonRow:
    """A row for a finding that belongs to no other row. ``node``: the text of the column NODE."""
    row_name = next((name for prefixes, name in _ROW_BY_PREFIX if finding.code.startswith(prefixes)), "node")
    return _add_verdict(ComparisonRow(node, row_name, UNKNOWN, finding.message, ""), finding)


def _add_verdict(row: ComparisonRow, finding: Finding) -> ComparisonRow:
    """The row with the finding as its verdict."""
    return replace(row, verdict=finding.code, severity=finding.severity, todo=finding.hint)


def _route_row(spec: NodeSpec, state: NodeState) -> ComparisonRow:
    """The row of the tunnel: whether it is up, and its round trip."""
    tunnel = state.tunnel
    found, verdict = str(tunnel.state), AS_EXPECTED
    if tunnel.state is not TunnelPhase.UP:
        verdict = state.reason or str(state.health)
    elif tunnel.rtt_ms is not None:
        found = f"up, {format_milliseconds(tunnel.rtt_ms)}"
    return ComparisonRow(spec.name, ROUTE, describe_route(spec), found, verdict)


def _server_row(spec: NodeSpec, state: NodeState) -> ComparisonRow:
    """The row of the inference server: its kind and version, the route in use if there are several, and the latency."""
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
    """Yields a row for each expectation (``expect``) that mesh.yaml sets for the node."""
    expect = spec.expect
    if expect.hostname is not None:
        hostname = state.host.hostname
        matches = hostname is not None and hostname_matches(expect.hostname, hostname)
        yield _expectation_row(spec, "hostname", expect.hostname, hostname, matches)
    yield from _gpu_expectation_rows(spec, state.gpus)
    if expect.driver is not None:
        driver = state.host.driver
        matches = driver is not None and driver_matches(expect.driver, driver)
        yield _expectation_row(spec, "driver", expect.driver, driver, matches)
    if expect.models:
        available = {full_name(name) for name in state.backend.models}
        models = [name for name in expect.models if full_name(name) in available]
        found = ", ".join(models) if state.backend.state is BackendPhase.UP else None
        yield _expectation_row(spec, "models", ", ".join(expect.models), found, len(models) == len(expect.models))


def _gpu_expectation_rows(spec: NodeSpec, gpus: Sequence[GpuState] | None) -> Iterator[ComparisonRow]:
    """Yields a row for each of these that mesh.yaml expects: the number of GPUs, their name, their memory. ``gpus``:
    ``None`` if nothing is known."""
    expect = spec.expect
    known_gpus = gpus or ()

    def row(name: str, expected: str, found: str, matches: bool) -> ComparisonRow:
        return _expectation_row(spec, name, expected, None if gpus is None else found, matches)

    if expect.gpus is not None:
        yield row("GPUs", str(expect.gpus), str(len(known_gpus)), len(known_gpus) == expect.gpus)
    if expect.gpu is not None:
        expected_name = expect.gpu
        names = _join_distinct(short_gpu(gpu.name) for gpu in known_gpus)
        # Without a GPU nothing matches, although ``all`` of none would be true.
        matches = bool(known_gpus) and all(gpu_name_matches(expected_name, gpu.name) for gpu in known_gpus)
        yield row("GPU", short_gpu(expected_name), names, matches)
    if expect.vram_mib is not None:
        sizes = _join_distinct(f"{gpu.memory_total_mib} MiB" for gpu in known_gpus if gpu.memory_total_mib)
        matches = bool(known_gpus) and vram_matches(expect.vram_mib, known_gpus)
        yield row("VRAM", f"{expect.vram_mib} MiB", sizes, matches)


def _expectation_row(spec: NodeSpec, name: str, expected: str, found: str | None, matches: bool) -> ComparisonRow:
    """A row for one expectation. ``found`` is ``None`` if nothing is known, and empty if the host has nothing of the
    kind. ``matches``: it is as expected."""
    if found is None:
        return ComparisonRow(spec.name, name, expected, UNKNOWN, NOT_KNOWN)
    return ComparisonRow(spec.name, name, expected, found or "none", AS_EXPECTED if matches else "differs")


def _join_distinct(values: Iterator[str]) -> str:
    return ", ".join(sorted(set(values)))


def describe_route(spec: NodeSpec) -> str:
    """The route to the node, by mesh.yaml: its URLs, its SSH address, or the program that prints its address."""
    ssh = spec.ssh
    if ssh is None:
        return ", ".join(target.url for target in spec.backend.targets)
    if ssh.address_from is not None:
        program, *_ = ssh.address_from.command
        return f"ssh, address from {program}"
    port_suffix = "" if ssh.port == 22 else f":{ssh.port}"
    return f"ssh {ssh.user}@{ssh.host or ssh.alias}{port_suffix}"  # with an alias, mesh.yaml may name no host


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
    """A machine with its routes, or, if ``reached`` is false, all nodes that are not reached.

    ``remark``: the proof that the nodes are one machine."""

    title: str
    lines: tuple[RouteLine, ...]
    remark: str = ""
    reached: bool = True


def draw_topology(topology: Topology, states: Sequence[NodeState]) -> tuple[MachineBranch, ...]:
    """The machines with the routes that lead to them, then one branch with all nodes that are not reached."""
    specs = {spec.name: spec for spec in topology.nodes if spec.enabled}
    states_by_name = {state.name: state for state in states if state.name in specs}
    reached_nodes = [state for state in states_by_name.values() if state.tunnel.state is TunnelPhase.UP]
    branches = [_machine_branch(machine, specs, states_by_name) for machine in find_machines(reached_nodes)]
    unreached_nodes = [state for state in states_by_name.values() if state.tunnel.state is not TunnelPhase.UP]
    if unreached_nodes:
        lines = tuple(
            RouteLine(state.name, describe_route(specs[state.name]), state.reason or "", dim=True)
            for state in unreached_nodes
        )
        branches.append(MachineBranch("not reached", lines, reached=False))
    return tuple(branches)


_PROOF_REMARKS = {
    Proof.GPU: "one GPU: certain, by its UUID",
    Proof.HOST_KEY: "most likely one machine, by its SSH host key",
    Proof.STORE: "most likely one machine, by its model store",
}


def _machine_branch(machine: Machine, specs: Mapping[str, NodeSpec], states: Mapping[str, NodeState]) -> MachineBranch:
    """The branch of a machine. ``specs`` and ``states``: those of all nodes, by name."""
    node_states = [states[node] for node in machine.nodes]
    title = _describe_gpus(machine.gpus, node_states)
    hostnames = {state.host.hostname for state in node_states if state.host.hostname is not None}
    if hostnames:
        title += f" on {', '.join(sorted(hostnames))}"
    lines = [line for node in machine.nodes for line in _route_lines(specs[node], states[node])]
    remark = "" if machine.proof is None else _PROOF_REMARKS[machine.proof]
    return MachineBranch(title, tuple(lines), remark)


def _describe_gpus(gpus: Sequence[GpuState], nodes: Sequence[NodeState]) -> str:
    """The GPUs of a machine in a few words: ``2 x RTX 4090, 24.0 GiB``, and the beginning of its UUID for a single GPU.
    ``nodes``: the nodes on the machine."""
    if not gpus:  # ``node.gpus`` is not None if nvidia-smi has answered on that node
        return "no GPU" if any(node.gpus is not None for node in nodes) else "GPU not known"
    counts: dict[str, int] = {}  # by name and size
    for gpu in gpus:
        size = "" if gpu.memory_total_mib is None else f", {format_gib(gpu.memory_total_mib)} GiB"
        kind = f"{short_gpu(gpu.name)}{size}"
        counts[kind] = counts.get(kind, 0) + 1
    description = " + ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in counts.items())
    return f"{description} ({gpus[0].uuid[:12]}…)" if len(gpus) == 1 else description


def _route_lines(spec: NodeSpec, state: NodeState) -> Iterator[RouteLine]:
    """Yields a line for each route of a node, first the route in use. Only the first line has the node's name."""
    routes = state.routes
    current_route = route_in_use(state)
    name = spec.name
    for route in sorted(routes, key=lambda route: route is not current_route):  # ``sorted`` puts False first
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
    """How the route leads to the server: through SSH, or directly to its address."""
    if route.offered:  # not in mesh.yaml; the host's own address answers without SSH
        return f"{route.target} without SSH"
    if spec.ssh is None:
        return route.target
    return f"{describe_route(spec)} → {route.target}"


def _route_remark(route: RouteState, current_route: RouteState | None, state: NodeState) -> str:
    """What to add to a route: that it does not serve or is not in use, and its latency if it is known."""
    if route.state is BackendPhase.DOWN:
        return "does not serve"
    if route is current_route:
        return format_milliseconds(state.backend.latency_ms if route.latency_ms is None else route.latency_ms)
    if route.latency_ms is None:
        return "not in use"
    return f"not in use, {format_milliseconds(route.latency_ms)}"
