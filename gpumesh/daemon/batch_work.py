"""The work of a running mesh on its batches: opens their store, and says how many requests the mesh can run at once."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from functools import partial

from gpumesh.batches.base import BatchStore, Sender
from gpumesh.batches.engine import BatchWorker
from gpumesh.batches.opening import create_batch_store
from gpumesh.daemon.paths import MeshPaths
from gpumesh.errors import BatchStoreError
from gpumesh.mesh.mesh import Mesh
from gpumesh.state import Finding, Severity

log = logging.getLogger(__name__)

SLOTS_OF_ANY_NUMBER = 32  # of a node whose server says nothing about its slots, such as vLLM: it takes what comes
FINDING_CODE = "batch-store"
WAITS_HINT = "batches go on when it can be used again; `gpumesh explain batch-store` says more"
RESTART_COMMAND = "`gpumesh down && gpumesh up -d`"  # a store that could not be opened is not tried again


async def open_batches(stack: AsyncExitStack, mesh: Mesh, paths: MeshPaths) -> BatchStore | None:
    """Opens the store of the mesh's batches; the stack closes it. ``None`` if that is not possible, with a finding that
    says why: the mesh works without it."""
    try:
        return await stack.enter_async_context(create_batch_store(mesh.topology, paths.batches))
    except BatchStoreError as error:
        log.warning("no batches: %s", error, extra={"event": "batch"})
        hint = f"{error.hint}; then {RESTART_COMMAND}" if error.hint else f"{RESTART_COMMAND} tries it again"
        _show_problem(mesh, error, hint)
        return None


def make_worker(store: BatchStore, sender: Sender, mesh: Mesh) -> BatchWorker:
    """The worker of this mesh. A finding says when its store cannot be used."""
    return BatchWorker(store, sender, count_slots=partial(count_slots, mesh), on_problem=partial(report_problem, mesh))


def report_problem(mesh: Mesh, error: BatchStoreError | None) -> None:
    """Shows the error as a finding of the mesh; ``None``: there is no error any more."""
    if error is None:
        mesh.set_own_findings((), subject="batches")
    else:
        _show_problem(mesh, error, error.hint or WAITS_HINT)


def _show_problem(mesh: Mesh, error: BatchStoreError, hint: str) -> None:
    mesh.set_own_findings((Finding(FINDING_CODE, Severity.ERROR, None, error.message, hint),), subject="batches")


def count_slots(mesh: Mesh) -> int:
    """How many requests the mesh can run at once: the slots of all nodes that are up."""
    total = 0
    for node in mesh.fleet:
        account = node.account
        if not node.reachable:
            continue
        if account.max_parallel is not None:
            total += account.max_parallel
        elif account.learns_limit:
            total += account.learned_slots.most_proven
        else:
            total += SLOTS_OF_ANY_NUMBER if account.reported_parallel is None else account.reported_parallel
    return total
