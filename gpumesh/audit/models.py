"""Rules about models: whether the expected ones are there, and whether a name means the same model on all nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpumesh.backends.dialects import find_dialect
from gpumesh.model_names import full_name
from gpumesh.sentences import join_some
from gpumesh.state import BackendPhase, Finding, NodeState, Severity, TunnelPhase
from gpumesh.topology import NodeSpec

MAX_NAMED = 10  # models that a message names; it only counts the others


def check(spec: NodeSpec, state: NodeState) -> Iterator[Finding]:
    up = state.tunnel.state is TunnelPhase.UP and state.backend.state is BackendPhase.UP
    if not up or not spec.expect.models:
        return
    present = {full_name(name) for name in state.backend.models}
    missing = [name for name in spec.expect.models if full_name(name) not in present]
    if not missing:
        return
    dialect = find_dialect(state.backend.kind)
    hint = None if dialect is None else dialect.missing_model_hint(missing)
    yield Finding("model-missing", Severity.WARNING, spec.name, f"expected, but not there: {', '.join(missing)}", hint)


def check_across_nodes(states: Sequence[NodeState]) -> Iterator[Finding]:
    """Finds model names that have several digests: with such a name the answer to a prompt depends on the node."""
    first_seen: dict[str, tuple[str, str]] = {}  # the node and the digest, by the model's name
    differing: set[str] = set()
    for state in states:
        for model in state.backend.catalog:
            if model.digest:
                name = full_name(model.name)
                node, digest = first_seen.setdefault(name, (state.name, model.digest))
                if digest != model.digest and node != state.name:
                    differing.add(name)
    if differing:
        nodes = tuple(
            state.name
            for state in states
            if any(model.digest and full_name(model.name) in differing for model in state.backend.catalog)
        )
        yield Finding(
            "model-differs",
            Severity.WARNING,
            None,
            f"{join_some(sorted(differing), MAX_NAMED)} is not the same on {', '.join(nodes)}",
            "`ollama pull` it again on each of them, so that an answer does not depend on the node",
            nodes=nodes,
        )
