"""Frozen snapshots of the gateways that share the nodes of a mesh (`redis` in mesh.yaml). A part of ``gpumesh.state``.

Each field is a key of the JSON document ``gpumesh.status/1`` (docs/status-json.md), as in ``gpumesh.state``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class MeshGatewayState:
    """A gateway of the mesh: a process that sends requests to its nodes. ``own``: the gateway that tells this.

    ``id`` is new for each process. ``host`` is the name of its machine, ``since`` the time of its start by that
    machine's clock. ``in_flight`` and ``queued`` count its requests; those of other gateways are a second old at most.
    """

    id: str
    host: str
    pid: int
    version: str
    since: datetime
    in_flight: int
    queued: int
    own: bool = False
