"""The fleet's models and the nodes that have them, and the tasks by node of a command about models. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gpumesh.backends.dialects import KINDS_WITH_MODEL_STORE
from gpumesh.errors import NoNodeError, UsageError
from gpumesh.mesh.models.default_model import is_embedding_model
from gpumesh.model_names import full_name
from gpumesh.state import BackendPhase, MeshState, ModelInfo, NodeState

SHORT_DIGEST_CHARS = 12  # as many as `ollama list` shows


@dataclass(frozen=True, slots=True)
class LoadedCopy:
    """A model in a node's memory. ``left_s``: the seconds that it will stay there; ``None`` if that is not known."""

    node: str
    size_vram_mib: int | None
    left_s: float | None
    context_length: int | None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One model of the fleet: one name with one digest. ``copies``: the number of digests that nodes have under this
    name."""

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
    """One model of an operation, on one node."""

    node: NodeState
    model: str


def list_model_rows(state: MeshState) -> list[ModelRow]:
    """The models of all nodes that are up, by name; one row for each digest, the most widespread digest first."""
    # By the model's name and digest.
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
            left_s = None if model.expires_at is None else (model.expires_at - state.at).total_seconds()
            key = (model.name, catalog.get(model.name, ModelInfo(model.name)).digest)
            copy = LoadedCopy(node.name, model.size_vram_mib, left_s, model.context_length)
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
    """Whether the model turns text into vectors. A server needs another request to load such a model."""
    family = next((info.family for info in node.backend.catalog if full_name(info.name) == full_name(model)), None)
    return is_embedding_model(model, family)


def choose_nodes(
    state: MeshState, names: Sequence[str], *, everywhere: bool, required_model: str | None
) -> list[NodeState]:
    """The nodes for a command: those of ``names`` if there are any, else all nodes that are able to carry it out.

    A node is able if it is up, has a model store and, if ``required_model`` is given, has that model (whose tag may be
    left out). Raises UsageError if ``names`` are wrong, or if several nodes are able and ``everywhere`` is false.
    Raises NoNodeError if no node is able, or one of ``names`` is not up.
    """
    store_nodes = list_store_nodes(state)
    if names:
        return _find_named_nodes(state, names, store_nodes, required_model)
    able = [node for node in store_nodes if required_model is None or has_model(node, required_model)]
    if not able:
        message = (
            "no Ollama node is up" if required_model is None else f"no Ollama node that is up has {required_model!r}"
        )
        raise NoNodeError(message)
    if len(able) > 1 and not everywhere:
        raise UsageError("on which node?", hint=f"--node {able[0].name}, or --all for {len(able)} nodes")
    return able


def _find_named_nodes(
    state: MeshState, names: Sequence[str], store_nodes: Sequence[NodeState], required_model: str | None
) -> list[NodeState]:
    """The nodes of these names, each once. Raises UsageError and NoNodeError."""
    all_names = [node.name for node in state.nodes]
    for name in names:
        if name not in all_names:
            raise UsageError(f"there is no node {name!r}", hint=f"the nodes are: {', '.join(all_names)}")
    by_name = {node.name: node for node in store_nodes}
    not_up = [name for name in names if name not in by_name]
    if not_up:
        raise NoNodeError(f"{', '.join(not_up)}: no Ollama server that answers there now", node=not_up[0])
    nodes = [by_name[name] for name in dict.fromkeys(names)]
    if required_model is not None:
        lacking = [node.name for node in nodes if not has_model(node, required_model)]
        if lacking:
            raise UsageError(
                f"{', '.join(lacking)} has no model {required_model!r}", hint="`gpumesh models` lists them all"
            )
    return nodes


def plan_sync(state: MeshState, source: str, names: Sequence[str], models: Sequence[str]) -> list[ModelTask]:
    """The pulls that give other nodes the models of the node ``source``, with the same digests. ``names``: the other
    nodes, by default all that are up. ``models``: the models, by default all of ``source``. Raises UsageError and
    NoNodeError."""
    (source_node,) = choose_nodes(state, [source], everywhere=False, required_model=None)
    for model in models:
        if not has_model(source_node, model):
            raise UsageError(f"{source} has no model {model!r}", hint="`gpumesh models` lists them all")
    wanted_names = {full_name(model) for model in models}
    targets = choose_nodes(state, names, everywhere=True, required_model=None)
    source_infos = {info.name: info for info in source_node.backend.catalog}
    tasks = []
    for node in targets:
        if node.name == source:
            continue
        target_infos = {full_name(name): ModelInfo(name) for name in node.backend.models}
        target_infos |= {full_name(info.name): info for info in node.backend.catalog}
        for name in source_node.backend.models:
            if wanted_names and full_name(name) not in wanted_names:
                continue
            target_info = target_infos.get(full_name(name))
            if target_info is None or _digests_differ(source_infos.get(name, ModelInfo(name)), target_info):
                tasks.append(ModelTask(node, name))
    return tasks


def _digests_differ(info: ModelInfo, other: ModelInfo) -> bool:
    """False if one of the digests is not known."""
    return info.digest is not None and other.digest is not None and info.digest != other.digest


def shorten_digest(digest: str | None) -> str | None:
    return None if digest is None else digest.removeprefix("sha256:")[:SHORT_DIGEST_CHARS]
