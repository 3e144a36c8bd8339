"""Chooses the model for a prompt that names no model: the fleet's only chat model. Pure."""

from __future__ import annotations

from gpumesh.errors import NoNodeError, UsageError
from gpumesh.state import MeshState

# A model whose name or family contains one of these turns text into vectors, and cannot chat.
EMBEDDER_MARKS = ("bert", "embed")


def is_embedding_model(name: str, family: str | None) -> bool:
    """Whether a model seems to turn text into vectors, by its name and its family."""
    text = f"{family or ''} {name}".lower()
    return any(mark in text for mark in EMBEDDER_MARKS)


def chat_models(state: MeshState, node: str | None = None) -> tuple[str, ...]:
    """The chat models of the nodes that are up, or of ``node`` only. Each model is listed once, in the order of the
    nodes."""
    names: dict[str, None] = {}
    for node_state in state.nodes:
        is_wanted = node in (None, node_state.name)
        is_up = node_state.health.is_serving
        if not (is_wanted and is_up):
            continue
        families = {info.name: info.family or "" for info in node_state.backend.catalog}
        for name in node_state.backend.models:
            if not is_embedding_model(name, families.get(name)):
                names.setdefault(name)
    return tuple(names)


def choose_model(state: MeshState, node: str | None = None) -> str:
    """Returns the only chat model of the fleet, or of ``node``. Raises NoNodeError if there is none, and UsageError,
    which lists the models, if there are several."""
    models = chat_models(state, node)
    if len(models) == 1:
        return models[0]
    if not models:
        raise NoNodeError(
            "no node that is up has a model to chat with",
            hint="`gpumesh models pull NAME` fetches one, e.g. qwen2.5:7b",
        )
    raise UsageError(
        f"which model? there are: {', '.join(models)}",
        hint="choose one with -m, or set gateway.default_model in mesh.yaml",
    )
