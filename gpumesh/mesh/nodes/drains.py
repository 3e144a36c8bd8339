"""Drains of a node that another gateway has told: a person there asked for no new requests to it. Values only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DrainElsewhere:
    """A person has drained the node at another gateway. ``host`` is the name of that gateway's machine; it is safe to
    print."""

    gateway: str
    host: str


def describe_drain(holds: Iterable[object]) -> str | None:
    """Why a node gets no new requests that no person has drained here: one of ``NodeRole.drain_holds``. ``None`` if no
    other gateway is the reason."""
    hosts = sorted({hold.host for hold in holds if isinstance(hold, DrainElsewhere)})
    return f"drained at the gateway on {', '.join(hosts)}" if hosts else None
