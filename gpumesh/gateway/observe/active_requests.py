"""The requests that are being answered now, as people see them, and the cancelling of one of them.

A request costs one entry in a dictionary, which the gateway needs anyway to end its requests. All that people see is
computed when they look.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.observe.record import RequestRecord
from gpumesh.text.printable import printable

MAX_SHOWN = 200  # requests in one list: the oldest
MAX_TEXT_CHARS = 200  # a text that a client sends (a model, an id) is cut to this length
STORE_PATHS = ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/blobs/")


class ActiveRequest(msgspec.Struct, frozen=True, eq=False):
    """A request that is being answered, and the task that answers it. ``number`` is new for each request. ``task`` may
    be ``None`` only by its type: the server answers each request in a task."""

    number: int
    record: RequestRecord
    task: asyncio.Task[None] | None


@dataclass(frozen=True, slots=True)
class RequestState:
    """A request in flight. Its fields are keys of ``GET /mesh/requests``.

    - ``phase``: ``waiting`` for a slot, ``reading`` (a node has the request, and no answer has come yet), ``writing``
      (the answer streams), or ``working`` (a request that needs no slot, as a pull).
    - ``client`` is its name for fairness, ``key`` the name of its key; ``None``: it has sent none.
    - ``tokens``: about how many have come; ``None`` if that is not known. ``ttft_ms``: until the first of them.
    - ``forecast_s``: how long the answer was to take on ``node``. ``remaining_s``: how much of that is left; negative
      if it takes longer than forecast.
    """

    number: int
    phase: str
    client: str
    address: str | None
    key: str | None
    id: str | None
    method: str
    path: str
    model: str | None
    node: str | None
    priority: str | None
    age_s: float
    queue_s: float
    attempts: int
    continuations: int
    prompt_tokens: int | None
    tokens: int | None
    ttft_ms: float | None
    forecast_s: float | None
    remaining_s: float | None


class ActiveRequests:
    """The gateway's requests in flight, as far as people see and cancel them. ``entries`` is the gateway's own table.
    ``clock``: the clock of the records."""

    def __init__(self, entries: Mapping[Request, ActiveRequest], clock: Callable[[], float]) -> None:
        self._entries = entries
        self._clock = clock

    def list_requests(self, viewer: ClientKey | None) -> tuple[list[RequestState], int]:
        """The oldest requests that the holder of this key may see, and the number of all of them."""
        shown = [
            (request, active)
            for request, active in self._entries.items()
            if _is_shown(active.record) and _is_visible_to(viewer, request.key)
        ]
        now = self._clock()
        return [_describe(request, active, now) for request, active in shown[:MAX_SHOWN]], len(shown)

    def cancel(self, number: int, reason: str) -> bool:
        """Cancels the request of this number: its node gets a free slot at once, and its client gets ``reason`` as an
        error. Returns whether there was such a request, which people see."""
        for active in self._entries.values():
            if active.number == number and active.task is not None and _is_shown(active.record):
                if active.record.cancel_reason is None:  # a second click must not cancel the sending of the error
                    active.record.cancel_reason = reason
                    active.task.cancel()
                return True
        return False


def _is_shown(record: RequestRecord) -> bool:
    """Whether people want to see the request: it asks for a model, or changes a model store. The requests of pages and
    monitoring are not shown."""
    return record.demand is not None or record.path.startswith(STORE_PATHS)


def _is_visible_to(viewer: ClientKey | None, sender: ClientKey | None) -> bool:
    """Whether the holder of the key ``viewer`` may see a request that came with the key ``sender``: a key that is
    limited to a part of the mesh shows its own requests only."""
    return viewer is None or not viewer.is_limited or viewer == sender


def _describe(request: Request, active: ActiveRequest, now: float) -> RequestState:
    """What is shown of a request that is in the gateway now."""
    record, key, address = active.record, request.key, request.client_address
    demand, answer, progress = record.demand, record.answer, record.progress
    placement = progress.placement
    forecast_s = remaining_s = None
    if placement is not None and not placement.placed.ended:
        forecast_s = round(placement.forecast.own_s, 2)
        remaining_s = round(placement.placed.ends_at - now, 2)
    name = "" if demand is None else demand.client
    first_byte_at = record.first_byte_at
    return RequestState(
        number=active.number,
        phase=_phase(record),
        client=name or address or "",
        address=address,
        key=None if key is None else key.label,
        id=None if request.id is None else printable(request.id, MAX_TEXT_CHARS),
        method=record.method,
        path=printable(record.path, MAX_TEXT_CHARS),
        model=None if demand is None or demand.model is None else printable(demand.model, MAX_TEXT_CHARS),
        node=progress.node if answer is None else answer.node,
        priority=None if demand is None else str(demand.priority.value),
        age_s=round(max(now - record.started_at, 0.0), 1),
        queue_s=round(progress.queue_s, 2),
        attempts=progress.attempts,
        continuations=0 if answer is None else answer.continuations,
        prompt_tokens=None if demand is None else demand.prompt_tokens,
        tokens=None if answer is None or not answer.consists_of_frames else answer.streamed_tokens,
        ttft_ms=None if first_byte_at is None else round((first_byte_at - record.started_at) * 1000.0, 1),
        forecast_s=forecast_s,
        remaining_s=remaining_s,
    )


def _phase(record: RequestRecord) -> str:
    """The ``phase`` of ``RequestState``."""
    if record.demand is None or not record.demand.needs_slot:
        return "working"
    if record.answer is not None:
        return "writing"
    placement = record.progress.placement
    # A placement that has ended is that of an attempt without success: the request waits for another node.
    return "waiting" if placement is None or placement.placed.ended else "reading"
