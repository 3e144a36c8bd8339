"""Lists the fleet's models with the nodes that have them, and plans a command's tasks on these nodes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gpumesh.backends.dialects import KINDS_WITH_MODEL_STORE
from gpumesh.errors import NoNodeError, UsageError
from gpumesh.mesh.models.default_model import is_embedding_model
from gpumesh.state import BackendPhase, MeshState, ModelInfo, NodeState
from gpumesh.text.model_names import full_name

SHORT_DIGEST_CHARS = 12  # as many as `ollama list` shows


@dataclass(frozen=True, slots=True)
class LoadedCopy:
    """A model in a node's memory. ``left_s``: how many seconds the model will stay there; ``None`` if this is not
    known. ``context_length`` is in tokens."""

    node: str
    size_vram_mib: int | None
    left_s: float | None
    context_length: int | None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One model of the fleet: one name with one digest. ``nodes`` are the names of the nodes that have it, ``loaded``
    its copies in memory. ``copies``: the number of different digests that the fleet has under this name.
    ``context_length`` is in tokens. ``None``: the value is not known."""

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

    @property
    def differs_between_nodes(self) -> bool:
        """Whether another row has the same name with another digest."""
        return self.copies > 1


@dataclass(frozen=True, slots=True)
class ModelTask:
    """One model of an operation, on one node."""

    node: NodeState
    model: str


_ModelKey = tuple[str, str | None]
"""A model's name and digest; the digest may be unknown."""


def list_model_rows(state: MeshState) -> list[ModelRow]:
    """The models of all nodes that are up, sorted by name. Each digest of a name has its own row; the digest that most
    nodes have comes first."""
    node_names: dict[_ModelKey, list[str]] = {}
    infos: dict[_ModelKey, ModelInfo] = {}
    for node in list_up_nodes(state):
        catalog = {info.name: info for info in node.backend.catalog}
        for name in node.backend.models:
            info = catalog.get(name, ModelInfo(name))
            key = (name, info.digest)
            node_names.setdefault(key, []).append(node.name)
            infos.setdefault(key, info)
    digests: dict[str, set[str]] = {name: set() for name, _ in infos}  # the known digests of each name
    for name, digest in infos:
        if digest:
            digests[name].add(digest)
    loaded_copies = _list_loaded_copies(state)
    rows = [
        ModelRow(
            name=name,
            digest=digest,
            size_mib=info.size_mib,
            parameters=info.parameter_size,
            quantization=info.quantization,
            family=info.family,
            nodes=tuple(node_names[name, digest]),
            loaded=tuple(loaded_copies.get((name, digest), ())),
            copies=len(digests[name]) or 1,  # 1 if no node gives a digest
        )
        for (name, digest), info in infos.items()
    ]
    return sorted(rows, key=lambda row: (row.name, -len(row.nodes)))


def _list_loaded_copies(state: MeshState) -> dict[_ModelKey, list[LoadedCopy]]:
    """The models in the memory of the nodes that are up, by name and digest."""
    copies: dict[_ModelKey, list[LoadedCopy]] = {}
    for node in list_up_nodes(state):
        digests = {info.name: info.digest for info in node.backend.catalog}
        for model in node.backend.loaded:
            left_s = None if model.expires_at is None else (model.expires_at - state.at).total_seconds()
            copy = LoadedCopy(node.name, model.size_vram_mib, left_s, model.context_length)
            copies.setdefault((model.name, digests.get(model.name)), []).append(copy)
    return copies


def add_context_lengths(rows: Sequence[ModelRow], lengths: Mapping[tuple[str, str], int]) -> list[ModelRow]:
    """The rows with their context lengths. ``lengths`` are in tokens, by the names of node and model."""

    def find_length(row: ModelRow) -> int | None:
        """The length that the first of the model's nodes has given; ``None`` if none has."""
        for node in row.nodes:
            length = lengths.get((node, row.name))
            if length is not None:
                return length
        return None

    return [replace(row, context_length=find_length(row)) for row in rows]


def list_up_nodes(state: MeshState) -> list[NodeState]:
    """The nodes whose server is up."""
    return [node for node in state.nodes if node.backend.state is BackendPhase.UP]


def list_store_nodes(state: MeshState) -> list[NodeState]:
    """The nodes whose server is up and has a model store."""
    return [node for node in list_up_nodes(state) if node.backend.kind in KINDS_WITH_MODEL_STORE]


def has_model(node: NodeState, model: str) -> bool:
    """Whether the node lists the model; its tag may be left out."""
    return full_name(model) in {full_name(name) for name in node.backend.models}


def is_embedder_on(node: NodeState, model: str) -> bool:
    """Whether the model turns text into vectors, by what the node says of it. A server needs another request to load
    such a model."""
    family = next((info.family for info in node.backend.catalog if full_name(info.name) == full_name(model)), None)
    return is_embedding_model(model, family)


def choose_nodes(
    state: MeshState, names: Sequence[str], *, everywhere: bool, required_model: str | None
) -> list[NodeState]:
    """The nodes for a command: the nodes of ``names`` if there are any, else all nodes that are able to carry it out.

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
    """The nodes of these names, each once. Raises UsageError for a name that mesh.yaml does not have and for a node
    without ``required_model``, and NoNodeError for a node that is not up."""
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
    """The pulls after which other nodes have the models of the node ``source``, with the same digests. A node that has
    such a model with another digest pulls it again. ``names``: the other nodes; if empty, all nodes that are up.
    ``models``: the models; if empty, all models of ``source``. Raises UsageError for a name that is wrong, and
    NoNodeError for a node that is not up."""
    (source_node,) = choose_nodes(state, [source], everywhere=False, required_model=None)
    for model in models:
        if not has_model(source_node, model):
            raise UsageError(f"{source} has no model {model!r}", hint="`gpumesh models` lists them all")
    wanted_names = {full_name(model) for model in models or source_node.backend.models}
    source_digests = {info.name: info.digest for info in source_node.backend.catalog}
    tasks = []
    for node in choose_nodes(state, names, everywhere=True, required_model=None):
        if node.name == source:
            continue
        target_names = {full_name(name) for name in node.backend.models}
        target_digests = {full_name(info.name): info.digest for info in node.backend.catalog}
        for name in source_node.backend.models:
            if full_name(name) not in wanted_names:
                continue
            is_missing = full_name(name) not in target_names
            if is_missing or _digests_differ(source_digests.get(name), target_digests.get(full_name(name))):
                tasks.append(ModelTask(node, name))
    return tasks


def _digests_differ(digest: str | None, other_digest: str | None) -> bool:
    """Whether both digests are known, and are different. An unknown digest is no reason for a pull."""
    return digest is not None and other_digest is not None and digest != other_digest


def shorten_digest(digest: str | None) -> str | None:
    """The digest as `ollama list` shows it: its first 12 digits; ``None`` if it is not known."""
    return None if digest is None else digest.removeprefix("sha256:")[:SHORT_DIGEST_CHARS]
