"""Makes a ``PlacedRequest`` without a scheduler, for tests of what happens to it."""

from __future__ import annotations

from gpumesh.balancer.account import NodeAccount, PlacedRequest
from gpumesh.balancer.base import Demand
from gpumesh.balancer.work import Work


def make_placed(
    account: NodeAccount,
    demand: Demand,
    work: Work,
    *,
    now: float,
    unread_tokens: float = 100.0,
    cached_tokens: float = 0.0,
    read_s: float = 0.0,
    write_s: float = 0.0,
    drain_s: float | None = None,
    needs_load: bool | None = None,
) -> PlacedRequest:
    """A request whose answer is expected to begin after ``read_s``. It needs a load if it has a ``drain_s``."""
    key = demand.residency
    return PlacedRequest(
        account,
        demand,
        work,
        key,
        None if key is None else key.model,
        now,
        unread_tokens,
        cached_tokens,
        read_s,
        write_s,
        drain_s is not None if needs_load is None else needs_load,
        drain_s,
        now + read_s,
        now + read_s + write_s,
    )
