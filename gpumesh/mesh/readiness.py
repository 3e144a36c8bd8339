"""Waiting until the nodes of a mesh have reported, or until one of them can serve."""

from __future__ import annotations

import asyncio

from gpumesh.balancer.base import Demand
from gpumesh.balancer.select import select_candidates
from gpumesh.mesh.change_notifier import ChangeNotifier
from gpumesh.mesh.dispatch import GRACE_S, Dispatcher
from gpumesh.mesh.nodes.fleet import Fleet


async def wait_first_report(fleet: Fleet, timeout_s: float) -> None:
    """Returns once every node was probed or found out of reach, or when the deadline has passed."""
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(node.wait_reported() for node in fleet))
    except TimeoutError:
        pass  # what is known by then is the report


async def wait_usable(
    fleet: Fleet, dispatcher: Dispatcher, changes: ChangeNotifier, demand: Demand, *, timeout_s: float
) -> str:
    """The name of the first node that can serve this demand, as soon as one can.

    Raises NoNodeError or ModelMissing once it is known that none will, or when the deadline has passed. A node that was
    lost only just now is waited for, as a request in the queue waits for it.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    try:
        async with asyncio.timeout_at(deadline) as scope:
            async for _ in changes.watch():
                selection = select_candidates(fleet.candidates(), demand)
                if selection.free or selection.busy:
                    return (selection.free or selection.busy)[0].name
                if not all(node.reported for node in fleet if demand.node in (None, node.name)):
                    continue
                if not dispatcher.is_worth_waiting(demand):
                    raise fleet.explain_no_node(demand)
                deadline = min(deadline, loop.time() + GRACE_S)
                scope.reschedule(deadline)
    except TimeoutError:
        pass
    raise fleet.explain_no_node(demand)
