"""The changes that make mesh.yaml true, for `audit --write`. Pure.

Only errors of the *file* are corrected: a wrong hostname, GPU or kind of server, and nodes that duplicate another node
or lead nowhere. An error of a *host* (a broken driver, a missing model, a server that does not run) stays a finding:
a file that no longer expects the GPU or the model would only hide the error.

A node is switched off, never deleted: a person changes one word to get the node back. An absent node is switched off
only if the host of some other node answers. If no host answers, the fault is probably this machine's network; a server
on this machine says nothing about the network. A duplicate is switched off in any case: it adds nothing, and the node
that it duplicates stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gpumesh.addresses import is_loopback
from gpumesh.audit import gpus, identity, routes
from gpumesh.state import Finding, NodeState, TunnelPhase
from gpumesh.topology import BackendKind, NodeSpec, Topology

# The errors of a tunnel that mean: there is no such host. Not among them are errors that a person must decide about (a
# host key), and errors that pass by themselves (a lost connection).
_HOST_ABSENT_CODES = frozenset({"connect-refused", "connect-timeout", "host-unresolved", "host-unreachable", "not-ssh"})
_EXPECT_CODES = frozenset({"hostname-differs", "gpu-differs", "gpu-count", "vram-differs", "driver-differs"})


@dataclass(frozen=True, slots=True)
class Change:
    """A new value for one key of mesh.yaml.

    ``path`` names the key below the node: ``("expect", "gpus")``. ``settled_codes`` are the codes of the findings that
    the change settles: findings about ``node``, or about several nodes of which ``node`` is one. ``why`` is the reason,
    for a comment in the file.
    """

    node: str
    path: tuple[str, ...]
    value: str | int | bool
    settled_codes: frozenset[str]
    why: str | None = None


def plan_changes(topology: Topology, nodes: Sequence[NodeState], findings: Sequence[Finding]) -> tuple[Change, ...]:
    """The changes in the order of mesh.yaml. A key of the file is changed at most once; a node that is switched off
    gets no other change."""
    states = {state.name: state for state in nodes}
    specs = {spec.name: spec for spec in topology.nodes if spec.enabled and spec.name in states}
    any_host_answers = any(
        states[name].tunnel.state is TunnelPhase.UP for name, spec in specs.items() if _uses_network(spec)
    )
    switched_off = dict(_switch_off_absent(specs, states, findings)) if any_host_answers else {}
    # An absent duplicate gets the reason of a duplicate, because this stays true when the host comes back.
    switched_off.update(_switch_off_duplicates(specs, states, findings))
    changes: list[Change] = []
    for name, spec in specs.items():
        if name in switched_off:
            changes.append(switched_off[name])
            continue
        codes = {finding.code for finding in findings if finding.node == name}
        changes += _correct_expectations(spec, states[name], codes)
        changes += _correct_kind(spec, states[name], codes)
    return tuple(changes)


def _uses_network(spec: NodeSpec) -> bool:
    return spec.ssh is not None or not all(is_loopback(target.host) for target in spec.backend.targets)


def unsettled_findings(findings: Sequence[Finding], changes: Sequence[Change]) -> tuple[Finding, ...]:
    """The findings that none of ``changes`` settles."""
    settled = {(change.node, code) for change in changes for code in change.settled_codes}
    return tuple(
        finding
        for finding in findings
        if not any((name, finding.code) in settled for name in (finding.nodes or (finding.node,)))
    )


def apply_changes(topology: Topology, changes: Sequence[Change]) -> Topology:
    """The topology with ``changes``. It is what the file must mean after the changes are written into it."""
    nodes = []
    for spec in topology.nodes:
        new_spec = spec
        for change in changes:
            if change.node == spec.name:
                new_spec = _apply_change(new_spec, change)
        nodes.append(new_spec)
    return replace(topology, nodes=tuple(nodes))


def _apply_change(spec: NodeSpec, change: Change) -> NodeSpec:
    match change.path:
        case ("enabled",):
            return replace(spec, enabled=bool(change.value))
        case ("backend", "kind"):
            return replace(spec, backend=replace(spec.backend, kind=BackendKind(str(change.value))))
        case ("expect", key):
            # mypy cannot know the type of the value for this key. The reader of mesh.yaml checks it.
            return replace(spec, expect=replace(spec.expect, **{key: change.value}))  # type: ignore[arg-type]
        case _:
            raise ValueError(f"no such change: {change.path}")


def _switch_off_duplicates(
    specs: dict[str, NodeSpec], states: dict[str, NodeState], findings: Sequence[Finding]
) -> Iterator[tuple[str, Change]]:
    """The nodes that duplicate another node, by name, each with its change."""
    for finding in findings:
        names = [name for name in finding.nodes if name in specs]
        if finding.code not in ("same-gpu", "tunnel-duplicate") or len(names) < 2:
            continue
        node_to_keep = identity.choose_node_to_keep(names, specs, states)
        shared = "the same server" if finding.code == "tunnel-duplicate" else "the same GPU"
        for name in names:
            if name != node_to_keep:
                why = f"{shared} as {node_to_keep}"
                yield name, Change(name, ("enabled",), False, frozenset({finding.code}), why)


def _switch_off_absent(
    specs: dict[str, NodeSpec], states: dict[str, NodeState], findings: Sequence[Finding]
) -> Iterator[tuple[str, Change]]:
    """The nodes whose host is not there, by name, each with its change."""
    for finding in findings:
        state = states.get(finding.node or "")
        if state is None or finding.node not in specs or finding.code not in ("node-unreachable", "backend-down"):
            continue
        tunnel = state.tunnel
        if tunnel.state is not TunnelPhase.UP and tunnel.error_code in _HOST_ABSENT_CODES:
            why = f"not found: {finding.message}"
            yield state.name, Change(state.name, ("enabled",), False, frozenset({finding.code}), why)


def _correct_expectations(spec: NodeSpec, state: NodeState, codes: set[str]) -> Iterator[Change]:
    """Corrects all keys of ``expect`` together: another GPU has a single finding, but its memory differs as well."""
    if not codes & _EXPECT_CODES:
        return
    expect, present = spec.expect, state.gpus or ()  # present: the GPUs that nvidia-smi shows

    def change(key: str, value: str | int, code: str) -> Change:
        return Change(spec.name, ("expect", key), value, frozenset({code}))

    hostname = state.host.hostname
    if (
        expect.hostname is not None
        and hostname is not None
        and not identity.hostname_matches(expect.hostname, hostname)
    ):
        yield change("hostname", hostname, "hostname-differs")
    if not present:
        return
    if "gpu-count" in codes and expect.gpus is not None:
        yield change("gpus", len(present), "gpu-count")
    names = {gpu.name for gpu in present}
    if (
        expect.gpu is not None
        and not all(gpus.gpu_name_matches(expect.gpu, name) for name in names)
        and len(names) == 1
    ):
        yield change("gpu", names.pop(), "gpu-differs")
    sizes = {gpu.memory_total_mib for gpu in present}
    if expect.vram_mib is not None and not gpus.vram_matches(expect.vram_mib, present) and len(sizes) == 1:
        size = sizes.pop()
        if size is not None:
            yield change("vram_mib", size, "vram-differs")
    if "driver-differs" in codes and state.host.driver is not None:
        yield change("driver", state.host.driver, "driver-differs")


def _correct_kind(spec: NodeSpec, state: NodeState, codes: set[str]) -> Iterator[Change]:
    """Corrects the kind of the server if all candidates that answer are servers of one other kind."""
    if "wrong-server" not in codes:
        return
    kinds = {route.kind for route in state.routes if not route.offered and route.kind is not None}
    if len(kinds) == 1 and routes.route_in_use(state) is None and (kind := kinds.pop()) != spec.backend.kind:
        yield Change(spec.name, ("backend", "kind"), kind, frozenset({"wrong-server"}))
