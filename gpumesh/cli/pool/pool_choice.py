"""Which pool a command means, and which pool is planned: one of mesh.yaml, or one for a model. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gpumesh.config.value_parsers import format_size, parse_pool_model, parse_size
from gpumesh.errors import UsageError, unknown_node, unknown_pool
from gpumesh.pool_spec import KvType, PoolMember, PoolSpec, is_model_path
from gpumesh.state import BackendPhase, MeshState
from gpumesh.text.model_names import full_name
from gpumesh.text.quoting import yaml_text
from gpumesh.topology import NodeSpec, Topology

MAX_NAME_CHARS = 40  # of a pool that is named after its model


def choose_pool(pools: Sequence[PoolSpec], name: str | None) -> PoolSpec:
    """The pool that is called ``name``; without a name, the only pool. Raises UsageError."""
    names = [pool.name for pool in pools]
    if name is None and len(pools) == 1:
        return pools[0]
    if name is None and pools:
        raise UsageError("mesh.yaml has several pools: name one of them", hint=f"the pools are: {', '.join(names)}")
    if name is None:
        raise UsageError("mesh.yaml has no pools", hint="`gpumesh pool plan MODEL` shows one, and what to write there")
    if name not in names:
        raise unknown_pool(name, names)
    return pools[names.index(name)]


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a person wants to be planned: ``wanted`` is the name of a pool, or a model; ``None``: the only pool. The
    other values replace those of the pool; ``None``: they are not given."""

    wanted: str | None
    members: tuple[PoolMember, ...] | None = None
    head: str | None = None
    context: int | None = None
    parallel: int | None = None
    kv_type: KvType | None = None
    draft: str | None = None
    llama_cpp_dir: str | None = None

    @property
    def changes_pool(self) -> bool:
        """Whether a value is given that a pool of mesh.yaml may not have."""
        return self != PlanRequest(self.wanted)

    def find_pool(self, topology: Topology) -> PoolSpec | None:
        """The pool of mesh.yaml that is meant; ``None`` if a model is. Raises UsageError."""
        if self.wanted is None or self.wanted in [pool.name for pool in topology.pools]:
            return choose_pool(topology.pools, self.wanted)
        return None

    def member_names(self, topology: Topology) -> list[str]:
        """The nodes that may take part, for which the plan has to wait. Raises UsageError."""
        pool = self.find_pool(topology)
        return [member.node for member in self._choose_members(pool, topology)]

    def make_spec(self, topology: Topology, state: MeshState) -> PoolSpec:
        """The pool to be planned. ``state`` tells which node has the model. Raises UsageError."""
        pool = self.find_pool(topology)
        members = self._choose_members(pool, topology)
        if pool is None:
            pool = PoolSpec(name_after(self.wanted or ""), self._check_model(topology, state), members, members[0].node)
            owners = find_owners(pool.model, state)
            pool = replace(pool, head=next((node.node for node in members if node.node in owners), pool.head))
        names = [member.node for member in members]
        if self.head is not None and self.head not in names:
            raise UsageError(f"--head {self.head} is none of the pool's nodes", hint=f"these are: {', '.join(names)}")
        return replace(
            pool,
            members=members,
            split=pool.split if self.members is None else None,  # it goes by the members
            head=self.head or (pool.head if pool.head in names else names[0]),
            context=pool.context if self.context is None else self.context,
            parallel=pool.parallel if self.parallel is None else self.parallel,
            kv_type=pool.kv_type if self.kv_type is None else self.kv_type,
            draft=pool.draft if self.draft is None else self.draft,
            llama_cpp_dir=pool.llama_cpp_dir if self.llama_cpp_dir is None else self.llama_cpp_dir,
        )

    def _choose_members(self, pool: PoolSpec | None, topology: Topology) -> tuple[PoolMember, ...]:
        """The nodes that are given; else those of the pool; else all nodes on whose hosts programs can be started."""
        if self.members is not None:
            known = [node.name for node in topology.nodes if not node.pool_members]
            for member in self.members:
                if member.node not in known:
                    raise unknown_node(member.node, known)
            return self.members
        if pool is not None:
            return pool.members
        own_nodes = [node for node in topology.nodes if not node.pool_members]  # none of them is itself a running pool
        members = tuple(PoolMember(node.name) for node in own_nodes if can_run_programs(node))
        if not members:
            raise UsageError(
                "no node can take part in a pool: it needs nodes with `ssh`, or on this machine",
                hint="`gpumesh node add 'ssh root@HOST -p PORT'` adds one",
            )
        return members

    def _check_model(self, topology: Topology, state: MeshState) -> str:
        """The model that is named. Raises UsageError if that is neither a path nor a model of any node."""
        model = self.wanted or ""
        try:
            parse_pool_model(model)
        except ValueError as error:
            raise UsageError(f"{model[:60]!r} {error}") from error
        if is_model_path(model) or find_owners(model, state):
            return model
        if any(node.backend.state is not BackendPhase.UP for node in state.nodes):
            return model  # a node that has not answered may have it: the plan tells
        pools = ", ".join(pool.name for pool in topology.pools)
        hint = "`gpumesh models` lists the models; a GGUF file is named by its whole path on the head's host"
        raise UsageError(
            f"no node has the model {model!r}, and no pool is called so",
            hint=f"the pools are: {pools}; {hint}" if pools else hint,
        )


def can_run_programs(node: NodeSpec) -> bool:
    """Whether a pool can use the node: its host is reached by SSH or is this machine, and it is no pool itself."""
    return node.enabled and not node.pool_members and node.has_host


def find_owners(model: str, state: MeshState) -> set[str]:
    """The nodes whose server has the model, by their names."""
    wanted = full_name(model)
    return {node.name for node in state.nodes if wanted in map(full_name, node.backend.models)}


def parse_members(texts: Iterable[str]) -> tuple[PoolMember, ...]:
    """The nodes that options name: ``a,b``, also with the memory that the pool may take: ``a=20GiB``. Raises
    UsageError."""
    members: dict[str, PoolMember] = {}
    for word in (word.strip() for text in texts for word in text.split(",")):
        name, _, size = word.partition("=")
        if not name:
            raise UsageError(f"--nodes {word!r} names no node", hint="write --nodes a,b or --nodes a=20GiB,b")
        if name in members:
            raise UsageError(f"--nodes names {name} twice")
        try:
            members[name] = PoolMember(name, parse_size(size) if size else None)
        except ValueError as error:
            raise UsageError(f"--nodes: {size!r} {error}") from error
    return tuple(members.values())


def name_after(model: str) -> str:
    """A name for the pool of a model: ``llama3.3-70b`` for ``llama3.3:70b``."""
    stem = model.rsplit("/", 1)[-1].removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-")[:MAX_NAME_CHARS] or "pool"


def yaml_entry(spec: PoolSpec) -> str:
    """The pool as an entry of ``pools:`` in mesh.yaml, on one line, without what has its default."""
    nodes = ", ".join(
        member.node
        if member.memory_mib is None
        else f"{{node: {member.node}, memory: {format_size(member.memory_mib)}}}"
        for member in spec.members
    )
    parts = [f"name: {spec.name}", f"model: {yaml_text(spec.model)}", f"nodes: [{nodes}]", f"head: {spec.head}"]
    parts += [f"context: {spec.context}", f"parallel: {spec.parallel}"]
    if spec.kv_type is not KvType.F16:
        parts.append(f"kv_type: {spec.kv_type}")
    if spec.split is not None:
        parts.append(f"split: {list(spec.split)}")
    if spec.draft is not None:
        parts.append(f"draft: {yaml_text(spec.draft)}")
    if spec.llama_cpp_dir is not None:
        parts.append(f"llama_cpp_dir: {yaml_text(spec.llama_cpp_dir)}")
    parts += [f"{name}: true" for name in ("unload", "autostart") if getattr(spec, name)]
    return f"- {{ {', '.join(parts)} }}"
