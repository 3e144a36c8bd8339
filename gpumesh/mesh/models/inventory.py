"""Which models the fleet has on which nodes, and what a command about models must do on which node. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gpumesh.backends.dialects import KINDS_WITH_MODEL_STORE
from gpumesh.errors import NoNodeError, UsageError
from gpumesh.mesh.models.default_model import is_embedding_model
from gpumesh.model_names import full_name
from gpumesh.state import BackendPhase, MeshState, ModelInfo, NodeState

SHORT_DIGEST = 12  # as `ollama list` shows them


@dataclass(frozen=True, slots=True)
class LoadedCopy:
    """A model in a node's memory. ``left_s``: how long it will stay there; ``None`` when that is not known."""

    node: str
    size_vram_mib: int | None
    left_s: float | None
    context_length: int | None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One model of the fleet: one name and digest. ``copies``: how many digests the name has."""

    name: str
    digest: str | None
    size_mib: int | None
    parameters: str | None
    quantization: str | None
    family: str | None
    nodes: tuple[str, ...]
    loaded: tuple[LoadedCopy, ...] = ()
    copies: int = 1
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class ModelTask:
    """An operation's model and node."""

    node: NodeState
    model: str


def list_model_rows(state: MeshState) -> list[ModelRow]:
    """The models of all nodes that are up, by name; one row for each digest, the most widespread digest first."""
    nodes: dict[tuple[str, str | None], list[str]] = {}
    infos: dict[tuple[str, str | None], ModelInfo] = {}
    loaded: dict[tuple[str, str | None], list[LoadedCopy]] = {}
    for node in list_up_nodes(state):
        catalog = {info.name: info for info in node.backend.catalog}
        for name in node.backend.models:
            info = catalog.get(name, ModelInfo(name))
            key = (name, info.digest)
            nodes.setdefault(key, []).append(node.name)
            infos.setdefault(key, info)
        for model in node.backend.loaded:
            left = None if model.expires_at is None else (model.expires_at - state.at).total_seconds()
            key = (model.name, catalog.get(model.name, ModelInfo(model.name)).digest)
            copy = LoadedCopy(node.name, model.size_vram_mib, left, model.context_length)
            loaded.setdefault(key, []).append(copy)
    digests: dict[str, set[str]] = {}
    for name, digest in nodes:
        digests.setdefault(name, set()).update({digest} if digest else ())
    rows = [
        ModelRow(
            name=name,
            digest=digest,
            size_mib=infos[name, digest].size_mib,
            parameters=infos[name, digest].parameter_size,
            quantization=infos[name, digest].quantization,
            family=infos[name, digest].family,
            nodes=tuple(names),
            loaded=tuple(loaded.get((name, digest), ())),
            copies=len(digests[name]) or 1,
        )
        for (name, digest), names in nodes.items()
    ]
    return sorted(rows, key=lambda row: (row.name, -len(row.nodes)))


def add_context_lengths(rows: Sequence[ModelRow], lengths: Mapping[tuple[str, str], int]) -> list[ModelRow]:
    """The rows with their context lengths; ``lengths`` is by node and model."""

    def find_length(row: ModelRow) -> int | None:
        return next((lengths[node, row.name] for node in row.nodes if (node, row.name) in lengths), None)

    return [replace(row, context_length=find_length(row)) for row in rows]


def list_up_nodes(state: MeshState) -> list[NodeState]:
    return [node for node in state.nodes if node.backend.state is BackendPhase.UP]


def list_store_nodes(state: MeshState) -> list[NodeState]:
    """The nodes that are up and have a model store of their own."""
    return [node for node in list_up_nodes(state) if node.backend.kind in KINDS_WITH_MODEL_STORE]


def has_model(node: NodeState, model: str) -> bool:
    """Whether the node lists the model; its tag may be left out."""
    return full_name(model) in {full_name(name) for name in node.backend.models}


def is_embedder_on(node: NodeState, model: str) -> bool:
    """Whether the model turns text into vectors: such a model is loaded by another call."""
    family = next((info.family for info in node.backend.catalog if full_name(info.name) == full_name(model)), None)
    return is_embedding_model(model, family)


def choose_nodes(
    state: MeshState, names: Sequence[str], *, everywhere: bool, required_model: str | None
) -> list[NodeState]:
    """The nodes that a command is for. Raises UsageError when that is not clear, NoNodeError when no node can take it.

    ``required_model``: only nodes that have this model can take the command; its tag may be left out.
    """
    known = [node.name for node in state.nodes]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no node {name!r}", hint=f"the nodes are: {', '.join(known)}")
    capable = list_store_nodes(state)
    if names:
        by_name = {node.name: node for node in capable}
        missing = [name for name in names if name not in by_name]
        if missing:
            raise NoNodeError(f"{', '.join(missing)}: no Ollama server that answers there now", node=missing[0])
        chosen = [by_name[name] for name in dict.fromkeys(names)]
        without = [node.name for node in chosen if required_model is not None and not has_model(node, required_model)]
        if without:
            raise UsageError(
                f"{', '.join(without)} has no model {required_model!r}", hint="`gpumesh models` lists them all"
            )
        return chosen
    if required_model is not None:
        capable = [node for node in capable if has_model(node, required_model)]
    if not capable:
        message = (
            "no Ollama node is up" if required_model is None else f"no Ollama node that is up has {required_model!r}"
        )
        raise NoNodeError(message)
    if len(capable) > 1 and not everywhere:
        raise UsageError("on which node?", hint=f"--node {capable[0].name}, or --all for {len(capable)} nodes")
    return capable


def plan_sync(state: MeshState, source: str, names: Sequence[str], models: Sequence[str]) -> list[ModelTask]:
    """What other nodes (``names``, or all that are up) must pull to have the models of ``source`` (``models``, or
    all), with the same digests. Raises UsageError and NoNodeError."""
    (origin,) = choose_nodes(state, [source], everywhere=False, required_model=None)
    for model in models:
        if not has_model(origin, model):
            raise UsageError(f"{source} has no model {model!r}", hint="`gpumesh models` lists them all")
    wanted = {full_name(model) for model in models}
    targets = choose_nodes(state, names, everywhere=True, required_model=None)
    infos = {info.name: info for info in origin.backend.catalog}
    tasks = []
    for node in targets:
        if node.name == source:
            continue
        own_infos = {full_name(name): ModelInfo(name) for name in node.backend.models}
        own_infos |= {full_name(info.name): info for info in node.backend.catalog}
        for name in origin.backend.models:
            if wanted and full_name(name) not in wanted:
                continue
            own = own_infos.get(full_name(name))
            if own is None or _digests_differ(infos.get(name, ModelInfo(name)), own):
                tasks.append(ModelTask(node, name))
    return tasks


def _digests_differ(info: ModelInfo, other: ModelInfo) -> bool:
    """False when a digest is not known."""
    return info.digest is not None and other.digest is not None and info.digest != other.digest


def shorten_digest(digest: str | None) -> str | None:
    return None if digest is None else digest.removeprefix("sha256:")[:SHORT_DIGEST]
