"""The names that the shell can complete: nodes, models, priorities and scenarios.

Completion reads a file and a socket at most, and never fails or waits.

Completed text goes into a shell. Names from hosts and from mesh.yaml pass ``_safe_names``, which lets only plain names
through: no shell and no program finds a special meaning in them. The scripts are in ``completion_scripts.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from gpumesh.errors import GPUMeshError
from gpumesh.quoting import is_plain


def _safe_names(names: Iterable[object], incomplete: str) -> list[str]:
    """The names that begin with ``incomplete`` and are safe in every shell."""
    return [name for name in names if isinstance(name, str) and name.startswith(incomplete) and is_plain(name)]


def complete_nodes(ctx: typer.Context, incomplete: str) -> list[str]:
    """The nodes of mesh.yaml. No command of mesh.yaml is run, and ssh is not asked about aliases."""
    with contextlib.suppress(GPUMeshError, OSError):
        from gpumesh import config
        from gpumesh.config import environment
        from gpumesh.config.mesh_file import reader

        path = config.find_config(_config_option(ctx))
        text = reader.read_text(path, path.name)
        topology = config.parse(text, file=path.name, env=environment.variables(), home=environment.home(), source=path)
        return _safe_names((node.name for node in topology.nodes), incomplete)
    return []


def complete_models(ctx: typer.Context, incomplete: str) -> list[str]:
    """The models of a running mesh. Names from hosts are hostile until ``_safe_names`` has filtered them."""
    names: set[str] = set()
    with contextlib.suppress(GPUMeshError, OSError, KeyError, TypeError):
        from gpumesh import config
        from gpumesh.daemon import paths
        from gpumesh.daemon.control_socket.quick_status import fetch_status

        state = fetch_status(paths.for_config(config.find_config(_config_option(ctx))).socket, timeout_s=0.5)
        for node in state["nodes"] if state is not None else ():
            names.update(_safe_names(node["backend"]["models"], incomplete))
    return sorted(names)


def complete_priorities(incomplete: str) -> list[str]:
    from gpumesh.balancer.base import Priority

    return [priority for priority in Priority if priority.startswith(incomplete)]


def complete_scenarios(incomplete: str) -> list[str]:
    """The scenarios of `bench run`."""
    from gpumesh.bench.scenarios import Scenario

    return [scenario for scenario in Scenario if scenario.startswith(incomplete)]


def _config_option(ctx: typer.Context) -> Path | None:
    """The value of ``--config``, before or after the command's name."""
    if (after_command := ctx.meta.get("gpumesh.config")) is not None:
        return Path(after_command)
    context: Any = ctx
    while context is not None:
        if (before_command := context.params.get("config")) is not None:
            return Path(before_command)
        context = context.parent
    return None
