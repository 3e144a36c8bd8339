"""The models that are expected, and whether one name means one thing everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpumesh.quoting import command
from gpumesh.state import BackendPhase, Finding, NodeState, Severity, TunnelPhase
from gpumesh.topology import BackendKind, NodeSpec


def check(spec: NodeSpec, state: NodeState) -> Iterator[Finding]:
    if state.tunnel.state is not TunnelPhase.UP or state.backend.state is not BackendPhase.UP:
        return
    there = {full_name(name) for name in state.backend.models}
    missing = [name for name in spec.expect.models if full_name(name) not in there]
    if not missing:
        return
    if spec.backend.kind is BackendKind.OLLAMA:
        hint = "on the host: " + "; ".join(command("ollama pull {MODEL}", MODEL=name) for name in missing)
    else:
        hint = "start the server with this model, or under this name (`--alias`, `--served-model-name`)"
    yield Finding("model-missing", Severity.WARNING, spec.name, f"expected, but not there: {', '.join(missing)}", hint)


def across(states: Sequence[NodeState]) -> Iterator[Finding]:
    """One name, several digests: the same prompt gets another answer depending on the node."""
    digests: dict[str, dict[str, str]] = {}
    for state in states:
        for model in state.backend.catalog:
            if model.digest:
                digests.setdefault(full_name(model.name), {})[state.name] = model.digest
    differing = {name: nodes for name, nodes in digests.items() if len(set(nodes.values())) > 1}
    if differing:
        nodes = tuple(dict.fromkeys(node for held in differing.values() for node in held))
        yield Finding(
            "model-differs",
            Severity.WARNING,
            None,
            f"{', '.join(sorted(differing))} is not the same on {', '.join(nodes)}",
            "`ollama pull` it again on each of them, so that an answer does not depend on the node",
            nodes=nodes,
        )


def full_name(model: str) -> str:
    """Ollama's rule: without a tag ``:latest`` is meant, and case does not count."""
    name = model.strip().lower()
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"
