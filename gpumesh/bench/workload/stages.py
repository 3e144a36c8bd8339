"""A stage of a benchmark: requests that are sent under one condition. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gpumesh.backends.base import ChatRequest


class StageKind(StrEnum):
    """What a stage measures: nothing (it only warms up), the capacity of a node, one node alone, the mesh, or a trace.

    Stages of the first two kinds give no figures of the result.
    """

    WARM_UP = "warm-up"
    CAPACITY = "capacity"
    NODE = "node"
    MESH = "mesh"
    TRACE = "trace"


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request to send to ``node``, or to the mesh if ``node`` is ``None``.

    ``at_s``: in an open loop, when to send the request, in seconds from the start of the stage.

    ``conversation``: requests with the same id are turns of one conversation. A turn is sent when the answer before it
    has ended; what was said before is put in front of the messages of ``chat``.

    ``route``: over which route to the node (``route_names``); ``None`` unless the stage is ``over_routes``.
    """

    chat: ChatRequest
    node: str | None = None
    at_s: float | None = None
    conversation: int | None = None
    route: str | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """Requests under one condition. A closed loop keeps ``concurrency`` in flight; an open loop sends by the clock.

    ``node`` is the node that is measured alone, ``None`` for the mesh. ``disturb``: a node is taken out of service in
    the middle of the stage. ``over_routes``: each request takes its own route to the node.
    ``duration_s``: after this time nothing more is sent, and the requests that are left over are not records.
    ``think_s``: the time between an answer and the next turn of its conversation.
    ``direct``: the requests go to the node's server through its tunnel, without the mesh. ``attempt`` is more than 1 if
    the stage is measured again (``scenarios/settled.py``): then the earlier results of this name do not count.
    """

    name: str
    kind: StageKind
    requests: tuple[PlannedRequest, ...]
    node: str | None = None
    concurrency: int | None = None
    disturb: bool = False
    over_routes: bool = False
    duration_s: float | None = None
    think_s: float = 0.0
    direct: bool = False
    attempt: int = 1

    @property
    def open_loop(self) -> bool:
        """Whether requests are sent by the clock, whether or not earlier answers have come."""
        return self.concurrency is None
