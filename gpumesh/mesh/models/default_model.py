"""Which model a prompt means that names none. Pure."""

from __future__ import annotations

from gpumesh.errors import NoNodeError, UsageError
from gpumesh.state import Health, MeshState

# Families of models that turn text into vectors and cannot chat.
EMBEDDERS = ("bert", "embed")


def is_embedding_model(name: str, family: str | None) -> bool:
    said = f"{family or ''} {name}".lower()
    return any(mark in said for mark in EMBEDDERS)


def chat_models(state: MeshState, node: str | None = None) -> tuple[str, ...]:
    """The models that nodes which are up could chat with, each once, in the order of the nodes."""
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
    """The only model there is. Raises UsageError that lists them when there are several, NoNodeError when none."""
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
