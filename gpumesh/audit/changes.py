"""The changes that make mesh.yaml true, for `audit --write`. Pure.

Only errors of the *file* are corrected: who the host is, which GPUs it has, which kind of server it runs, and nodes
that duplicate another node or lead nowhere. An error of a *host* (a broken driver, a missing model, a server that does
not run) is not mended by no longer expecting it: it stays a finding.

A node is switched off, never deleted: one word brings it back. No node is switched off while no node at all can be
reached: then the fault is this machine's network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gpumesh.audit import gpus, identity, routes
from gpumesh.state import BackendPhase, Finding, NodeState, TunnelPhase
from gpumesh.topology import BackendKind, NodeSpec, Topology

# No host was there. A fault that a person must decide about (keys) or that passes by itself (a lost connection) is not
# among these.
_NO_HOST = frozenset({"connect-refused", "connect-timeout", "host-unresolved", "host-unreachable", "not-ssh"})
_EXPECT_CODES = frozenset({"hostname-differs", "gpu-differs", "gpu-count", "vram-differs", "driver-differs"})


@dataclass(frozen=True, slots=True)
class Change:
    """``path`` is below the node: ``("expect", "gpus")``. ``settled_codes`` are the codes of the findings that the
    change settles: findings about ``node``, or about several nodes of which ``node`` is one. ``why`` is for a comment
    in the file."""

    node: str
    path: tuple[str, ...]
    value: str | int | bool
    settled_codes: frozenset[str]
    why: str | None = None


def plan_changes(topology: Topology, nodes: Sequence[NodeState], findings: Sequence[Finding]) -> tuple[Change, ...]:
    """In the order of mesh.yaml, at most one for each of its keys."""
    states = {state.name: state for state in nodes}
    specs = {spec.name: spec for spec in topology.nodes if spec.enabled and spec.name in states}
    reached = any(states[name].backend.state is BackendPhase.UP for name in specs)
    switched_off = dict(_switch_off_duplicates(specs, states, findings))
    if reached:
        switched_off = {**dict(_switch_off_absent(specs, states, findings)), **switched_off}
    changes = []
    for name, spec in specs.items():
        if name in switched_off:
            changes.append(switched_off[name])
            continue
        codes = {finding.code for finding in findings if finding.node == name}
        changes += _correct_expectations(spec, states[name], codes)
        changes += _correct_kind(spec, states[name], codes)
    return tuple(changes)


def unsettled_findings(findings: Sequence[Finding], made: Sequence[Change]) -> tuple[Finding, ...]:
    """The findings that no change settles."""
    settled = {(change.node, code) for change in made for code in change.settled_codes}
    return tuple(
        finding
        for finding in findings
        if not any((name, finding.code) in settled for name in (finding.nodes or (finding.node,)))
    )


def apply_changes(topology: Topology, made: Sequence[Change]) -> Topology:
    """What the file must mean once the changes are written: the written file is checked against it."""
    nodes = []
    for spec in topology.nodes:
        changed = spec
        for change in made:
            if change.node == spec.name:
                changed = _apply_change(changed, change)
        nodes.append(changed)
    return replace(topology, nodes=tuple(nodes))


def _apply_change(spec: NodeSpec, change: Change) -> NodeSpec:
    match change.path:
        case ("enabled",):
            return replace(spec, enabled=bool(change.value))
        case ("backend", "kind"):
            return replace(spec, backend=replace(spec.backend, kind=BackendKind(str(change.value))))
        case ("expect", key):
            # Which key takes which type is checked when the file is read.
            return replace(spec, expect=replace(spec.expect, **{key: change.value}))  # type: ignore[arg-type]
        case _:
            raise ValueError(f"no such change: {change.path}")


def _switch_off_duplicates(
    specs: dict[str, NodeSpec], states: dict[str, NodeState], findings: Sequence[Finding]
) -> Iterator[tuple[str, Change]]:
    for finding in findings:
        names = [name for name in finding.nodes if name in specs]
        if finding.code not in ("same-gpu", "tunnel-duplicate") or len(names) < 2:
            continue
        keep = identity.choose_node_to_keep(names, specs, states)
        why = "the same server" if finding.code == "tunnel-duplicate" else "the same GPU"
        for name in names:
            if name != keep:
                yield name, Change(name, ("enabled",), False, frozenset({finding.code}), f"{why} as {keep}")


def _switch_off_absent(
    specs: dict[str, NodeSpec], states: dict[str, NodeState], findings: Sequence[Finding]
) -> Iterator[tuple[str, Change]]:
    for finding in findings:
        state = states.get(finding.node or "")
        if state is None or finding.node not in specs or finding.code not in ("node-unreachable", "backend-down"):
            continue
        tunnel = state.tunnel
        if tunnel.state is not TunnelPhase.UP and tunnel.error_code in _NO_HOST:
            why = f"not found: {finding.message}"
            yield state.name, Change(state.name, ("enabled",), False, frozenset({finding.code}), why)


def _correct_expectations(spec: NodeSpec, state: NodeState, codes: set[str]) -> Iterator[Change]:
    """Corrects all of ``expect`` at once: where the GPU has another name, its memory differs as well."""
    if not codes & _EXPECT_CODES:
        return
    expect, present = spec.expect, state.gpus or ()

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
    """Names the kind of the server, where all candidates that answer are of the same other kind."""
    if "wrong-server" not in codes:
        return
    kinds = {route.kind for route in state.routes if not route.offered and route.kind is not None}
    if len(kinds) == 1 and routes.route_in_use(state) is None and (kind := kinds.pop()) != spec.backend.kind:
        yield Change(spec.name, ("backend", "kind"), kind, frozenset({"wrong-server"}))
