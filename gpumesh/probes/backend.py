"""The probe of a node's inference server: asks all candidates, uses the first in order that answers rightly."""

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

GRACE_S = 1.0  # for earlier candidates that hang, once a later one has answered


@dataclass(frozen=True, slots=True)
class BackendReport:
    """``url`` is the candidate in use, one of those that were given, and ``inventory`` what its server said; both are
    ``None`` when no candidate answered rightly. ``findings`` says why not, or what of the answer was of no use."""

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
    """Asks all candidates side by side; the first in order that answers as a server of this kind is used.

    ``urls`` are the routes to ``spec.targets``, in the same order. ``known_kinds`` is kept by the caller from one probe
    to the next, so that with kind ``auto`` a server is asked once which kind it is. Never raises on a server's account.
    The client must have ``trust_env`` off: a request through a tunnel must not go to a proxy that the environment
    names.
    """
    known_kinds = KnownKinds() if known_kinds is None else known_kinds
    if not urls:
        return _down_report(
            spec, ProbeError("there is no way to it now", finding_code="backend-down"), node, known_kinds
        )
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
            return _down_report(spec, _most_telling([_error_of(task) for task in tasks]), node, known_kinds)
        answer = tasks[index].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    known_kinds.last = answer.kind
    return _up_report(urls[index], answer, node)


async def _wait_for_first_in_order(tasks: Sequence[asyncio.Future[TimedInventory]]) -> int | None:
    """The index of the first success in order, ``None`` if no task succeeds. Returns as soon as no earlier task can
    succeed any more, or ``GRACE_S`` after the first success."""
    pending: set[asyncio.Future[TimedInventory]] = set(tasks)
    timeout: float | None = None
    while True:
        best = next((index for index, task in enumerate(tasks) if task.done() and task.exception() is None), None)
        if best is not None and all(task.done() for task in tasks[:best]):
            return best
        if not pending:
            return best
        if best is not None and timeout is None:
            timeout = GRACE_S
        before = time.monotonic()
        done, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if timeout is not None:
            timeout = max(timeout - (time.monotonic() - before), 0.0)
            if not done:
                return best


def _error_of(task: asyncio.Future[TimedInventory]) -> ProbeError:
    error = task.exception()
    if isinstance(error, ProbeError):
        return error
    assert error is not None, "no candidate answered"
    if not isinstance(error, Exception):
        raise error
    # A bug of ours, in reading an answer that nobody foresaw. It costs this node, not the mesh; the log has its trace.
    log.error("a server's answer to a probe could not be read", exc_info=error, extra={"event": "probe-failed"})
    return unusable_answers.broken_answer_error(f"what it says cannot be read ({type(error).__name__})")


def _most_telling(errors: Sequence[ProbeError]) -> ProbeError:
    """A wrong answer tells more than none."""
    return next((error for error in errors if error.finding_code != "backend-down"), errors[0])


def _up_report(url: str, answer: TimedInventory, node: str) -> BackendReport:
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
    count = inventory.unusable
    if not count:
        return ()
    entries = "1 entry" if count == 1 else f"{count} entries"
    message = f"{entries} of its list of models {'has' if count == 1 else 'have'} no name that can be asked for"
    hint = "see what its own list says on the host, and give the models plain names"
    return (Finding("model-unusable", Severity.WARNING, node, message, hint),)


def _down_report(spec: BackendSpec, error: ProbeError, node: str, known_kinds: KnownKinds) -> BackendReport:
    kind = known_kinds.last or spec.kind
    state = BackendState(
        kind=kind.value, state=BackendPhase.DOWN, last_error=error.message, error_code=error.finding_code
    )
    return BackendReport(state, (Finding(error.finding_code, Severity.ERROR, node, error.message, error.hint),))
