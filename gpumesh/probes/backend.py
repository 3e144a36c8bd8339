"""Probes a node's inference server: asks all candidates of mesh.yaml at once, and uses the first that answers right."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from gpumesh.backends import unusable_answers
from gpumesh.backends.base import Inventory
from gpumesh.errors import ProbeError
from gpumesh.probes.server_inventory import TimedInventory, ask_server
from gpumesh.probes.server_kind import KnownKinds
from gpumesh.state import BackendPhase, BackendState, Finding, Severity
from gpumesh.topology import BackendSpec

log = logging.getLogger(__name__)

GRACE_S = 1.0  # how long the first good answer waits for the answers of earlier candidates


@dataclass(frozen=True, slots=True)
class BackendReport:
    """The result of one probe.

    ``url`` is the URL of the candidate in use, and ``inventory`` is its server's answer. Both are ``None`` if no
    candidate gave a right answer. Then ``findings`` say why; else they say which parts of the answer could not be used.
    """

    state: BackendState
    findings: tuple[Finding, ...] = ()
    url: str | None = None
    inventory: Inventory | None = None


async def probe_backend(
    client: httpx.AsyncClient,
    spec: BackendSpec,
    urls: Sequence[str],
    *,
    api_key: str | None,
    timeout_s: float,
    node: str,
    known_kinds: KnownKinds | None = None,
) -> BackendReport:
    """Asks all candidates at the same time, and reports on the first of them, in order, that answers as a server of
    this kind.

    ``urls`` are the routes to ``spec.targets``, in the same order. ``timeout_s`` is for each request. ``node`` is the
    name in the findings. The caller passes the same ``known_kinds`` to every probe of a node, so that with kind
    ``auto`` a server is asked only once which kind it is. Never raises because of what a server does. The client must
    have ``trust_env`` off: a request through a tunnel must not go to a proxy that the environment names.
    """
    known_kinds = KnownKinds() if known_kinds is None else known_kinds
    if not urls:
        return _down_report(
            spec, ProbeError("there is no way to it now", finding_code="backend-down"), node, known_kinds
        )
    # If only some of the targets have a URL, it is not known here which URL belongs to which target. Then the requests
    # name no target, and the server gets its URL's own address as the Host header.
    targets = spec.targets if len(spec.targets) == len(urls) else (None,) * len(urls)
    tasks = [
        asyncio.ensure_future(
            ask_server(client, spec.kind, url, target, api_key=api_key, timeout_s=timeout_s, known_kinds=known_kinds)
        )
        for url, target in zip(urls, targets, strict=True)
    ]
    try:
        index = await _wait_for_first_in_order(tasks)
        if index is None:
            error = _most_informative([_probe_error(task) for task in tasks])
            return _down_report(spec, error, node, known_kinds)
        answer = tasks[index].result()
    finally:
        for task in tasks:  # the answers of the other candidates are not needed
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    known_kinds.last = answer.kind
    return _up_report(urls[index], answer, node)


async def _wait_for_first_in_order(tasks: Sequence[asyncio.Future[TimedInventory]]) -> int | None:
    """Waits for a task that succeeds, and returns its index; ``None`` if all tasks fail.

    If several tasks succeed, the first of them in order counts. So a success is returned when all tasks before it have
    failed, but at the latest ``GRACE_S`` after the first success: a candidate that hangs must not hold up the probe.
    """
    pending: set[asyncio.Future[TimedInventory]] = set(tasks)
    grace_ends_at: float | None = None  # None before the first success
    while pending:
        # Before the first success, the time-outs of the tasks' own requests end the wait.
        timeout_s = None if grace_ends_at is None else max(grace_ends_at - time.monotonic(), 0.0)
        done, pending = await asyncio.wait(pending, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        successes = [index for index, task in enumerate(tasks) if task.done() and task.exception() is None]
        if not successes:
            continue
        first = successes[0]
        all_before_have_failed = all(task.done() for task in tasks[:first])
        grace_is_over = not done
        if grace_is_over or all_before_have_failed:
            return first
        if grace_ends_at is None:
            grace_ends_at = time.monotonic() + GRACE_S
    return None


def _probe_error(task: asyncio.Future[TimedInventory]) -> ProbeError:
    """The error with which a failed task ended. An exception that is a bug of ours counts as an answer that cannot be
    read. What is no ``Exception``, such as a cancellation, is raised."""
    error = task.exception()  # raises the cancellation of a cancelled task
    assert error is not None, "the task has succeeded"
    if isinstance(error, ProbeError):
        return error
    if not isinstance(error, Exception):  # KeyboardInterrupt, SystemExit
        raise error
    # A bug of ours: the code that reads answers did not expect this answer. The bug must not end the mesh, so the node
    # counts as down, and the log has the traceback.
    log.error("a server's answer to a probe could not be read", exc_info=error, extra={"event": "probe-failed"})
    return unusable_answers.broken_answer_error(f"what it says cannot be read ({type(error).__name__})")


def _most_informative(errors: Sequence[ProbeError]) -> ProbeError:
    """The first error about a wrong answer, which says more than an error about no answer; else the first error."""
    return next((error for error in errors if error.finding_code != "backend-down"), errors[0])


def _up_report(url: str, answer: TimedInventory, node: str) -> BackendReport:
    """The report on a server that gave its inventory at ``url``."""
    inventory = answer.inventory
    state = BackendState(
        kind=answer.kind.value,
        state=BackendPhase.UP,
        url=url,
        version=inventory.version,
        models=tuple(model.name for model in inventory.catalog),
        loaded=inventory.loaded,
        latency_ms=round(answer.latency_ms, 3),
        catalog=inventory.catalog,
        running=inventory.load.running,
        waiting=inventory.load.waiting,
        kv_cache_pct=inventory.load.kv_cache_pct,
    )
    return BackendReport(state, _find_unusable_models(inventory, node), url, inventory)


def _find_unusable_models(inventory: Inventory, node: str) -> tuple[Finding, ...]:
    """The finding about models whose name no request could use; empty if there are none."""
    count = inventory.unusable
    if not count:
        return ()
    entries = "1 entry" if count == 1 else f"{count} entries"
    message = f"{entries} of its list of models {'has' if count == 1 else 'have'} no name that can be asked for"
    hint = "see what its own list says on the host, and give the models plain names"
    return (Finding("model-unusable", Severity.WARNING, node, message, hint),)


def _down_report(spec: BackendSpec, error: ProbeError, node: str, known_kinds: KnownKinds) -> BackendReport:
    """The report on a node none of whose candidates gave a right answer; ``error`` becomes its finding."""
    kind = known_kinds.last or spec.kind  # a node of kind ``auto`` keeps the kind of the server that answered last
    state = BackendState(
        kind=kind.value, state=BackendPhase.DOWN, last_error=error.message, error_code=error.finding_code
    )
    return BackendReport(state, (Finding(error.finding_code, Severity.ERROR, node, error.message, error.hint),))
