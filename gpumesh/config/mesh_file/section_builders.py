"""Builds the parts of a topology that need nothing but their own section of mesh.yaml, and merges sections. Pure."""

from __future__ import annotations

from typing import TypeVar

from gpumesh.backends.dialects import find_dialect
from gpumesh.config.mesh_file.file_schema import Backend, Expect, Model, Pool, Tunnels
from gpumesh.config.mesh_file.model_rules import ALL_NODES
from gpumesh.config.mesh_file.value_types import Section
from gpumesh.pool_spec import PoolMember, PoolSpec
from gpumesh.topology import (
    DEFAULT_TUNNELS,
    BackendKind,
    BackendSpec,
    ExpectSpec,
    ModelSpec,
    Target,
    TunnelsSpec,
)

S = TypeVar("S", bound=Section)
T = TypeVar("T")

DEFAULT_PORT = 11434  # of a server whose kind is not given: the port of Ollama, the most common kind


def build_model(name: str, model: Model, node_names: tuple[str, ...]) -> ModelSpec:
    """Returns the rules for the model ``name``. ``node_names`` are all nodes of the mesh, for ``nodes: all``.

    If the file does not give ``copies``, the number depends on the other keys: one on each of ``nodes``; one for a
    pinned model without ``nodes``; else ``None``, as many as its demand requires.
    """
    nodes, wanted_copies = model.nodes, model.copies
    if nodes == (ALL_NODES,):
        nodes, wanted_copies = None, value_or(wanted_copies, len(node_names))
    elif nodes is not None:
        wanted_copies = value_or(wanted_copies, len(nodes))
    elif model.pinned:
        wanted_copies = value_or(wanted_copies, 1)
    return ModelSpec(
        name=name,
        nodes=nodes,
        prefer=model.prefer or (),
        wanted_copies=wanted_copies,
        pinned=value_or(model.pinned, False),
        context_steps=model.context_steps or (),
        aliases=model.aliases or (),
        fallback=model.fallback,
    )


def build_pool(pool: Pool) -> PoolSpec:
    """Returns the spec of a pool. Its first node is the head if the file names none."""
    members = tuple(PoolMember(member.node, member.memory) for member in pool.nodes)
    head = pool.head or members[0].node
    default = PoolSpec(pool.name, pool.model, members, head)
    return PoolSpec(
        name=pool.name,
        model=pool.model,
        members=members,
        head=head,
        context=value_or(pool.context, default.context),
        parallel=value_or(pool.parallel, default.parallel),
        split=pool.split,
        draft=pool.draft,
        kv_type=value_or(pool.kv_type, default.kv_type),
        llama_cpp_dir=pool.llama_cpp_dir,
        unload=value_or(pool.unload, default.unload),
        autostart=value_or(pool.autostart, default.autostart),
    )


def build_tunnels(tunnels: Tunnels) -> TunnelsSpec:
    default = DEFAULT_TUNNELS
    return TunnelsSpec(value_or(tunnels.share, default.share), value_or(tunnels.listen, default.listen))


def drop_replaced_location(defaults: Backend, overrides: Backend) -> Backend:
    """Returns ``defaults`` without its port, url and urls if ``overrides`` has one of these keys.

    The three keys are three ways to give the location of one server: any of them replaces any other.
    """
    if overrides.port is None and overrides.url is None and overrides.urls is None:
        return defaults
    return defaults.replace(port=None, url=None, urls=None)


def build_backend(backend: Backend) -> BackendSpec:
    """Returns the spec of a backend. Without a location, the server is on 127.0.0.1 at the usual port of its kind."""
    kind = value_or(backend.kind, BackendKind.AUTO)
    if backend.urls is not None:
        targets = tuple(dict.fromkeys(backend.urls))  # without duplicates, in the order of the file
    elif backend.url is not None:
        targets = (backend.url,)
    elif backend.port is not None:
        targets = (Target("127.0.0.1", backend.port),)
    else:
        dialect = find_dialect(kind)
        port = None if dialect is None else dialect.usual_port
        targets = (Target("127.0.0.1", DEFAULT_PORT if port is None else port),)
    return BackendSpec(kind, targets, backend.api_key_env, backend.max_parallel)


def build_expect(expect: Expect) -> ExpectSpec:
    return ExpectSpec(expect.hostname, expect.gpus, expect.gpu, expect.vram_mib, expect.driver, expect.models or ())


def merge(defaults: S, overrides: S) -> S:
    """Returns the section with the values of ``overrides``, and of ``defaults`` where ``overrides`` has no value."""
    given_values = {key: value for key, value in vars(overrides).items() if value is not None}
    return defaults.replace(**given_values)


def value_or(value: T | None, default: T) -> T:
    """Returns ``value``, or ``default`` if the file gives no value.

    ``value or default`` would also replace 0 and ``False``, which a user may have written.
    """
    return default if value is None else value
