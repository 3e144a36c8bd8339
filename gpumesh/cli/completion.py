"""Shell completion: proposes the names of nodes, pools, models, batches, priorities and scenarios.

Completion reads a file and a socket at most, never fails, and waits at most ``STATUS_TIMEOUT_S``.

Completed text goes into a shell. Names from hosts and from mesh.yaml pass ``safe_names``, which lets only plain names
through: no shell and no program finds a special meaning in them. The scripts are in ``completion_scripts.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gpumesh.errors import GPUMeshError
from gpumesh.text.quoting import is_plain

if TYPE_CHECKING:
    from gpumesh.topology import Topology

STATUS_TIMEOUT_S = 0.5  # for the status of a running mesh: a person waits for the completion
COMPLETED_BATCHES = 100  # the latest


def safe_names(names: Iterable[object], incomplete: str) -> list[str]:
    """The names that begin with ``incomplete`` and are safe in every shell."""
    texts = [name for name in names if isinstance(name, str)]
    return [text for text in texts if text.startswith(incomplete) and is_plain(text)]


def complete_nodes(ctx: typer.Context, incomplete: str) -> list[str]:
    """The nodes of mesh.yaml; none if the file cannot be read."""
    topology = _read_topology(ctx)
    return [] if topology is None else safe_names((node.name for node in topology.nodes), incomplete)


def complete_pools(ctx: typer.Context, incomplete: str) -> list[str]:
    """The pools of mesh.yaml; none if the file cannot be read."""
    topology = _read_topology(ctx)
    return [] if topology is None else safe_names((pool.name for pool in topology.pools), incomplete)


def complete_pools_and_models(ctx: typer.Context, incomplete: str) -> list[str]:
    """The pools of mesh.yaml, then the models of a running mesh."""
    return [*complete_pools(ctx, incomplete), *complete_models(ctx, incomplete)]


def _read_topology(ctx: typer.Context) -> Topology | None:
    """What mesh.yaml says; ``None`` if the file cannot be read. No command of mesh.yaml is run, and ssh is not asked
    about aliases."""
    with contextlib.suppress(GPUMeshError, OSError):
        from gpumesh import config
        from gpumesh.config import environment
        from gpumesh.config.mesh_file import reader

        path = config.find_config(_config_option(ctx))
        text = reader.read_text(path, path.name)
        return config.parse(text, file=path.name, env=environment.variables(), home=environment.home(), source=path)
    return None


def complete_models(ctx: typer.Context, incomplete: str) -> list[str]:
    """The models of a running mesh, in the order of the alphabet; none if no mesh runs. Names from hosts are hostile
    until ``safe_names`` has filtered them."""
    names: set[str] = set()
    # KeyError and TypeError: the status of a mesh of another version may have another form.
    with contextlib.suppress(GPUMeshError, OSError, KeyError, TypeError):
        from gpumesh import config
        from gpumesh.daemon import paths
        from gpumesh.daemon.control_socket.quick_status import fetch_status

        mesh_paths = paths.for_config(config.find_config(_config_option(ctx)))
        status = fetch_status(mesh_paths.socket, timeout_s=STATUS_TIMEOUT_S)
        if status is not None:
            for node in status["nodes"]:
                names.update(safe_names(node["backend"]["models"], incomplete))
    return sorted(names)


def complete_batches(ctx: typer.Context, incomplete: str) -> list[str]:
    """The ids of the latest batches; none if their store cannot be read in time."""
    import asyncio

    # OSError and the errors of a damaged store, too: a completion never fails.
    with contextlib.suppress(Exception):
        return safe_names(asyncio.run(_read_batch_ids(ctx)), incomplete)
    return []


async def _read_batch_ids(ctx: typer.Context) -> list[str]:
    """The ids of the batches, the latest first. Raises TimeoutError after ``STATUS_TIMEOUT_S``."""
    import asyncio

    from gpumesh import config
    from gpumesh.batches.opening import create_batch_store
    from gpumesh.daemon import paths

    topology = _read_topology(ctx)
    if topology is None:
        return []
    mesh_paths = paths.for_config(config.find_config(_config_option(ctx)))
    async with asyncio.timeout(STATUS_TIMEOUT_S), create_batch_store(topology, mesh_paths.batches) as store:
        return [batch.id for batch in await store.list_batches(limit=COMPLETED_BATCHES)]


def complete_priorities(incomplete: str) -> list[str]:
    """The priorities of `run` that begin with ``incomplete``."""
    from gpumesh.balancer.base import Priority

    return [priority for priority in Priority if priority.startswith(incomplete)]


def complete_scenarios(incomplete: str) -> list[str]:
    """The scenarios of `bench run` that begin with ``incomplete``."""
    from gpumesh.bench.workload.settings import Scenario

    return [scenario for scenario in Scenario if scenario.startswith(incomplete)]


def complete_policies(incomplete: str) -> list[str]:
    """The policies of `bench simulate` that begin with ``incomplete``."""
    from gpumesh.bench.simulate.decisions import POLICY_NAMES

    return [name for name in POLICY_NAMES if name.startswith(incomplete)]


def _config_option(ctx: typer.Context) -> Path | None:
    """The value of ``--config`` after the command's name, else before it; ``None`` if it is not given."""
    value_after_command = ctx.meta.get("gpumesh.config")  # global_options._store_option has put it there
    if value_after_command is not None:
        return Path(value_after_command)
    context: Any = ctx
    while context is not None:
        value_before_command = context.params.get("config")
        if value_before_command is not None:
            return Path(value_before_command)
        context = context.parent
    return None
