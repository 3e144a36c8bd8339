"""Which nodes of a mesh a benchmark measures, and why the others are left out. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from gpumesh.errors import NoNodeError, UsageError
from gpumesh.state import BackendPhase, Finding, MeshState, NodeState


def usable_nodes(state: MeshState, model: str) -> list[NodeState]:
    """Returns the nodes that are up and have the model. A node whose models are unknown counts as having it."""
    return [node for node in state.nodes if _is_usable(node, model)]


def _is_usable(node: NodeState, model: str) -> bool:
    """Whether the node is up and has the model, or may have it."""
    is_up = node.health.is_serving and node.backend.state is BackendPhase.UP
    models = node.backend.models
    may_have_model = not models or has_model(models, model)  # no models: its list is unknown
    return is_up and may_have_model


def has_model(models: Sequence[str], model: str) -> bool:
    """Whether ``model`` is one of ``models``. As in Ollama, a name without a tag means ``:latest``."""
    if ":" not in model and f"{model}:latest" in models:
        return True
    return model in models


def select_nodes(nodes: Sequence[NodeState], only_node: str | None) -> list[NodeState]:
    """The node ``only_node``, or all nodes if ``only_node`` is ``None``."""
    return [node for node in nodes if only_node is None or node.name == only_node]


def no_usable_node(state: MeshState, model: str, only_node: str | None) -> NoNodeError | UsageError:
    """Makes the error for a run without a usable node: the reason of each node, or that there is no such node."""
    names = [node.name for node in state.nodes]
    if only_node is not None and only_node not in names:
        return UsageError(f"there is no node {only_node!r}", hint=f"the nodes are: {', '.join(names)}")
    candidates = select_nodes(state.nodes, only_node)
    reasons = "; ".join(f"{node.name}: {_exclusion_reason(node)}" for node in candidates)
    return NoNodeError(f"no node can serve {model!r} ({reasons})")


def _exclusion_reason(node: NodeState) -> str:
    """The reason why a node that is not usable is not measured: the reason of its health, or that it lacks the model.

    If neither is known, it is the health itself, for example ``unknown``.
    """
    if node.reason:
        return node.reason
    return "no such model there" if node.backend.models else node.health.value


def node_notes(nodes: Sequence[NodeState], findings: Sequence[Finding]) -> list[str]:
    """The notes about the measured hosts that qualify the figures."""
    notes = []
    if any(node.simulated for node in nodes):
        notes.append("simulated hosts: the figures are the stand-in's, not a GPU's")
    notes.extend(finding.message for finding in findings if finding.code == "same-gpu")
    return notes


def exclusion_notes(state: MeshState, measured: Sequence[NodeState]) -> list[str]:
    """A note for each node that is not measured, with the reason."""
    excluded_nodes = [node for node in state.nodes if node not in measured]
    return [f"{node.name} is not measured: {_exclusion_reason(node)}" for node in excluded_nodes]
