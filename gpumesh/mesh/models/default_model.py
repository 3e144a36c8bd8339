"""The model of a prompt that names no model: the only one with which the fleet can chat. Pure."""

from __future__ import annotations

from gpumesh.errors import NoNodeError, UsageError
from gpumesh.state import Health, MeshState

# Parts of the names and families of models that turn text into vectors and cannot chat.
EMBEDDER_MARKS = ("bert", "embed")


def is_embedding_model(name: str, family: str | None) -> bool:
    text = f"{family or ''} {name}".lower()
    return any(mark in text for mark in EMBEDDER_MARKS)


def chat_models(state: MeshState, node: str | None = None) -> tuple[str, ...]:
    """The models for chats on nodes that are up, each once, in the order of the nodes."""
    names: dict[str, None] = {}
    for entry in state.nodes:
        if node not in (None, entry.name) or entry.health not in (Health.HEALTHY, Health.DEGRADED):
            continue
        families = {info.name: info.family or "" for info in entry.backend.catalog}
        for name in entry.backend.models:
            if not is_embedding_model(name, families.get(name)):
                names.setdefault(name)
    return tuple(names)


def choose_model(state: MeshState, node: str | None = None) -> str:
    """The only model for chats. Raises UsageError that lists the models when there are several, NoNodeError when there
    is none."""
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
