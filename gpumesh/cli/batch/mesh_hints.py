"""Says on stderr what keeps the running mesh from working on a batch: it does not run, or has no such model."""

from __future__ import annotations

import asyncio

import typer

from gpumesh.cli.global_options import GlobalOptions
from gpumesh.cli.open_session import open_session, run_async, running_topology
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import GPUMeshError, ModelMissing

ANSWER_TIMEOUT_S = 5.0  # of a mesh that is asked for its models: the batch is stored already


def print_mesh_hint(options: GlobalOptions) -> None:
    """Says that nothing is sent now, if no mesh of this mesh.yaml runs here."""
    if not options.quiet and not _mesh_runs(options):
        where = " on this machine" if options.topology().redis is not None else ""
        typer.echo(f"no mesh is running{where} to work on batches: `gpumesh up -d` starts it", err=True)


def print_model_hint(options: GlobalOptions, model: str) -> None:
    """Says that no node has the model now, if a mesh runs that knows it. A node that is away may have it."""
    if options.quiet or not _mesh_runs(options):
        return
    missing = run_async(_find_missing(options, model))
    if missing is not None:
        typer.echo(clean_line(f"{missing.message} now; without it the requests fail: {missing.hint or ''}"), err=True)


def _mesh_runs(options: GlobalOptions) -> bool:
    """Whether a mesh of this mesh.yaml runs here; true also where that cannot be found out, as nothing is said then."""
    from gpumesh.daemon.mesh_lock import LockWatch

    try:
        watch = LockWatch.open(options.paths())
    except GPUMeshError:
        return True
    if watch is None:
        return False
    with watch:
        return watch.held


async def _find_missing(options: GlobalOptions, model: str) -> ModelMissing | None:
    """The error for the model, if the mesh knows that no node has it; ``None`` also for a mesh that does not answer."""
    from gpumesh.cli.fleet_models import find_models

    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S), open_session(options, embed=False) as session:
            models = await find_models(session, await running_topology(session, options), model)
    except (GPUMeshError, TimeoutError):
        return None
    return models.missing_error(model) if models.is_missing(model) else None
