"""Plans the changes that correct mesh.yaml, for `gpumesh audit --write`: expectations, and nodes to switch off. Pure.

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

from gpumesh.audit import gpus, identity, routes
from gpumesh.state import Finding, NodeState, TunnelPhase
from gpumesh.text.addresses import is_loopback
from gpumesh.topology import BackendKind, NodeSpec, Topology

# The errors of a tunnel that mean: there is no such host. Errors that a person must decide about (a host key), and
# errors that pass by themselves (a lost connection), are left out.
_HOST_ABSENT_CODES = frozenset({"connect-refused", "connect-timeout", "host-unresolved", "host-unreachable", "not-ssh"})
_EXPECT_CODES = frozenset({"hostname-differs", "gpu-differs", "gpu-count", "vram-differs", "driver-differs"})


@dataclass(frozen=True, slots=True)
class Change:
    """A new value for one key of a node in mesh.yaml.

    ``path`` names the key below the node: ``("expect", "gpus")``. ``settled_codes`` are the codes of the findings that
    the change settles, if they are about ``node`` or about several nodes with ``node`` among them. ``why`` is the
    reason, for a comment in the file.
    """

    node: str
    path: tuple[str, ...]
    value: str | int | bool
    settled_codes: frozenset[str]
    why: str | None = None


def plan_changes(topology: Topology, nodes: Sequence[NodeState], findings: Sequence[Finding]) -> tuple[Change, ...]:
    """Plans the changes of mesh.yaml, in the order of its nodes. A key of the file is changed at most once.

    A node that is switched off gets no other change.
    """
    states = {state.name: state for state in nodes}
    specs = {spec.name: spec for spec in topology.nodes if spec.enabled and spec.name in states}
    network_nodes = [name for name, spec in specs.items() if _uses_network(spec)]
    any_host_answers = any(states[name].tunnel.state is TunnelPhase.UP for name in network_nodes)
    switched_off: dict[str, Change] = {}
    if any_host_answers:
        switched_off.update(_switch_off_absent(specs, states, findings))
    # A duplicate that is also absent gets the reason of a duplicate, because this stays true when the host comes back.
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
    """Whether a node is on another machine: its tunnel then shows whether this machine's network works."""
    return spec.ssh is not None or any(not is_loopback(target.host) for target in spec.backend.targets)


def unsettled_findings(findings: Sequence[Finding], changes: Sequence[Change]) -> tuple[Finding, ...]:
    """Returns the findings that none of ``changes`` settles."""
    settled = {(change.node, code) for change in changes for code in change.settled_codes}
    unsettled: list[Finding] = []
    for finding in findings:
        names = finding.nodes or (finding.node,)
        is_settled = any((name, finding.code) in settled for name in names)  # a change of one of the nodes is enough
        if not is_settled:
            unsettled.append(finding)
    return tuple(unsettled)


def apply_changes(topology: Topology, changes: Sequence[Change]) -> Topology:
    """Returns the topology with ``changes``: what mesh.yaml must mean after the changes are written into it."""
    nodes = []
    for spec in topology.nodes:
        new_spec = spec
        for change in changes:
            if change.node == spec.name:
                new_spec = _apply_change(new_spec, change)
        nodes.append(new_spec)
    return replace(topology, nodes=tuple(nodes))


def _apply_change(spec: NodeSpec, change: Change) -> NodeSpec:
    """Returns the node with the change's value. Raises ``ValueError`` for a key that no change has."""
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
    """Yields the name of each node that duplicates another node, and the change that switches the node off."""
    for finding in findings:
        if finding.code not in ("same-gpu", "tunnel-duplicate"):
            continue
        names = [name for name in finding.nodes if name in specs]
        if len(names) < 2:  # the other nodes are switched off, or have no state
            continue
        node_to_keep = identity.choose_node_to_keep(names, specs, states)
        duplicate_of = "the same server" if finding.code == "tunnel-duplicate" else "the same GPU"
        for name in names:
            if name != node_to_keep:
                why = f"{duplicate_of} as {node_to_keep}"
                yield name, Change(name, ("enabled",), False, frozenset({finding.code}), why)


def _switch_off_absent(
    specs: dict[str, NodeSpec], states: dict[str, NodeState], findings: Sequence[Finding]
) -> Iterator[tuple[str, Change]]:
    """Yields the name of each node whose host is absent (``_HOST_ABSENT_CODES``), and the change to switch it off."""
    for finding in findings:
        if finding.node is None or finding.node not in specs:
            continue
        # ``backend-down`` is the code for a direct node whose host refuses the connection (audit/tunnel.py).
        if finding.code not in ("node-unreachable", "backend-down"):
            continue
        state = states[finding.node]
        tunnel = state.tunnel
        if tunnel.state is not TunnelPhase.UP and tunnel.error_code in _HOST_ABSENT_CODES:
            why = f"not found: {finding.message}"
            yield state.name, Change(state.name, ("enabled",), False, frozenset({finding.code}), why)


def _correct_expectations(spec: NodeSpec, state: NodeState, codes: set[str]) -> Iterator[Change]:
    """Yields changes of the wrong keys of ``expect``, if ``codes`` has a finding about one of them.

    The memory is corrected also without a finding of its own: another GPU has only ``gpu-differs``, but its memory
    differs as well.
    """
    if not codes & _EXPECT_CODES:
        return
    expect, found_gpus = spec.expect, state.gpus or ()

    def change_expectation(key: str, value: str | int, code: str) -> Change:
        return Change(spec.name, ("expect", key), value, frozenset({code}))

    expected, found = expect.hostname, state.host.hostname
    if expected is not None and found is not None and not identity.hostname_matches(expected, found):
        yield change_expectation("hostname", found, "hostname-differs")
    if not found_gpus:
        return
    # The number is corrected only after a ``gpu-count``. While a GPU is lost, there is no ``gpu-count``
    # (audit/causes.py), because the lost GPU must still be expected.
    if "gpu-count" in codes and expect.gpus is not None:
        yield change_expectation("gpus", len(found_gpus), "gpu-count")
    # mesh.yaml has one name and one size for all GPUs of a node, so there is no right value if the GPUs differ.
    names = {gpu.name for gpu in found_gpus}
    if expect.gpu is not None and len(names) == 1:
        (name,) = names
        if not gpus.gpu_name_matches(expect.gpu, name):
            yield change_expectation("gpu", name, "gpu-differs")
    sizes = {gpu.memory_total_mib for gpu in found_gpus}
    if expect.vram_mib is not None and len(sizes) == 1:
        (size,) = sizes
        if size is not None and not gpus.vram_matches(expect.vram_mib, found_gpus):
            yield change_expectation("vram_mib", size, "vram-differs")
    if "driver-differs" in codes and state.host.driver is not None:
        yield change_expectation("driver", state.host.driver, "driver-differs")


def _correct_kind(spec: NodeSpec, state: NodeState, codes: set[str]) -> Iterator[Change]:
    """Yields a change of ``backend.kind`` if all candidates that answer are servers of one other kind.

    No change if ``codes`` has no ``wrong-server``, or if a candidate is in use: then this one has the right kind.
    """
    if "wrong-server" not in codes or routes.route_in_use(state) is not None:
        return
    kinds = {route.kind for route in state.routes if not route.offered and route.kind is not None}
    if len(kinds) == 1:
        (kind,) = kinds
        if kind != spec.backend.kind:
            yield Change(spec.name, ("backend", "kind"), kind, frozenset({"wrong-server"}))
