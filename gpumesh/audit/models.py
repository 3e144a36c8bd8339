"""The audit's rules about models: whether expected models are missing, and whether a name means two models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpumesh.backends.dialects import find_dialect
from gpumesh.state import BackendPhase, Finding, NodeState, Severity, TunnelPhase
from gpumesh.text.model_names import full_name
from gpumesh.text.sentences import join_some
from gpumesh.topology import NodeSpec

MAX_NAMED = 10  # a message names at most so many models, and counts the others


def check(spec: NodeSpec, state: NodeState) -> Iterator[Finding]:
    """Yields ``model-missing`` if the server of a node that is up lacks models that mesh.yaml expects.

    One finding names all of these models. Its hint is ``None`` if the kind of server is unknown.
    """
    is_up = state.tunnel.state is TunnelPhase.UP and state.backend.state is BackendPhase.UP
    if not is_up or not spec.expect.models:
        return
    present_names = {full_name(name) for name in state.backend.models}
    missing = [name for name in spec.expect.models if full_name(name) not in present_names]
    if not missing:
        return
    dialect = find_dialect(state.backend.kind)
    hint = None if dialect is None else dialect.missing_model_hint(missing)
    yield Finding("model-missing", Severity.WARNING, spec.name, f"expected, but not there: {', '.join(missing)}", hint)


def check_across_nodes(states: Sequence[NodeState]) -> Iterator[Finding]:
    """Yields ``model-differs`` if a model's name has different digests on different nodes.

    With such a name, the answer to a prompt depends on the node. One finding is about all such names, and all nodes
    that have one of these names. A model whose digest is unknown is not compared.
    """
    nodes_by_name: dict[str, list[str]] = {}  # the nodes that have a model of this name
    first_by_name: dict[str, tuple[str, str]] = {}  # the first of these nodes, and the digest there
    differing_names: set[str] = set()
    for state in states:
        for model in state.backend.catalog:
            if model.digest:
                name = full_name(model.name)
                nodes_by_name.setdefault(name, []).append(state.name)
                first_node, first_digest = first_by_name.setdefault(name, (state.name, model.digest))
                is_other_node = state.name != first_node  # one node can list ``x`` and ``x:latest``: one full name
                if is_other_node and model.digest != first_digest:
                    differing_names.add(name)
    if differing_names:
        affected = {node for name in differing_names for node in nodes_by_name[name]}
        nodes = tuple(state.name for state in states if state.name in affected)  # in the order of ``states``
        yield Finding(
            "model-differs",
            Severity.WARNING,
            None,
            f"{join_some(sorted(differing_names), MAX_NAMED)} is not the same on {', '.join(nodes)}",
            "`ollama pull` it again on each of them, so that an answer does not depend on the node",
            nodes=nodes,
        )
