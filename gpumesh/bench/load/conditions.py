"""Under which conditions a stage was measured: the load generator's process, the mesh's, and the machine. Values only.

They decide whether the figures are those of the mesh's nodes (``load_judge``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Via(StrEnum):
    """On which way the requests of a benchmark reach a server."""

    GATEWAY = "gateway"
    """Over HTTP to the mesh's gateway, as clients do."""
    MESH = "mesh"
    """By the control socket, or into the mesh of this process: as `gpumesh run` does."""
    DIRECT = "direct"
    """Over HTTP to the local port of each node's tunnel, past the mesh's balancer."""
    URL = "url"
    """Over HTTP to a server that belongs to no mesh."""


class Limit(StrEnum):
    """What limited the figures of a stage, if not the servers."""

    CLIENT_BOUND = "client-bound"
    """The load generator's process."""
    MESH_BOUND = "mesh-bound"
    """The mesh's process, or one of its tunnels."""
    MACHINE_BUSY = "machine-busy"
    """This machine has too few cores for all that runs on it."""


@dataclass(frozen=True, slots=True)
class ProcessLoad:
    """How busy a process was. ``cpu`` is its CPU time ÷ wall time: 1 is one core.

    ``waiting`` is the share of the time in which its main thread could have run and had no core. The two shares
    ``first_token_cpu`` and ``first_token_waiting`` are the same for the main thread, but only of the time in which a
    request waited for its first token: the median over all requests. ``None``: this system does not say.
    """

    cpu: float
    waiting: float | None = None
    first_token_cpu: float | None = None
    first_token_waiting: float | None = None


@dataclass(frozen=True, slots=True)
class MachineLoad:
    """How busy this machine was. ``busy`` is the share of all its ``cores``, from 0 to 1.

    ``other_cpu`` is what all processes used that are neither the load generator nor the mesh; 1 is one core.
    """

    cores: int
    busy: float
    other_cpu: float


@dataclass(frozen=True, slots=True)
class LoadConditions:
    """The conditions of a stage.

    ``generator`` is the process that has sent the requests. ``own_process``: it does nothing else; otherwise it is also
    the process of the command, and of the mesh if that is embedded. ``mesh`` is the mesh's process, ``tunnel_cpu`` the
    CPU of its busiest other process. ``lag_p90_ms`` is how late the generator's event loop ran. ``us_per_piece`` is the
    generator's CPU time for each piece of an answer, in µs. ``parsed_early`` counts the answers that were parsed while
    the stage still ran, because they did not fit into memory. ``burst_wait_ms`` is an estimate of how long the median
    request waited for the mesh's process, because others were sent at the same time (``burst_wait``).

    ``limit`` and ``reason`` say why the figures may not be those of the servers; ``None`` if there is no such reason.
    """

    via: Via
    own_process: bool
    generator: ProcessLoad
    mesh: ProcessLoad | None = None
    tunnel_cpu: float | None = None
    machine: MachineLoad | None = None
    lag_p90_ms: float = 0.0
    us_per_piece: float | None = None
    parsed_early: int = 0
    burst_wait_ms: float | None = None
    limit: Limit | None = None
    reason: str | None = None
