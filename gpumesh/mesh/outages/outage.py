"""Outages that somebody asks for, to measure what they do: how a node is taken out of service. Values only.

``out_of_service.py`` does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class OutageKind(StrEnum):
    """How a node is taken out of service."""

    DRAIN = "drain"
    """It gets no new requests; those that run there end by themselves."""
    TUNNEL = "tunnel"
    """The connection of its SSH tunnel is cut, as a crash would cut it, and the tunnel stays closed."""
    SERVER = "server"
    """Its inference server is stopped by a command of the user, and started again by another."""


@dataclass(frozen=True, slots=True)
class Outage:
    """How a node is taken out of service. The two commands, for the host's shell, are for ``SERVER`` only."""

    kind: OutageKind
    stop_command: str | None = None
    start_command: str | None = None
