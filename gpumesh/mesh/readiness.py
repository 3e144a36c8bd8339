"""Waits until all nodes of a mesh have reported (the first report), or until a node can serve a demand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gpumesh.balancer.base import Demand
from gpumesh.balancer.select import allows_node
from gpumesh.errors import NoNodeError
from gpumesh.mesh.change_notifier import ChangeNotifier
from gpumesh.mesh.dispatch import GRACE_S, Dispatcher
from gpumesh.mesh.nodes.fleet import Fleet


async def wait_first_report(fleet: Fleet, timeout_s: float) -> None:
    """Returns as soon as every node was probed or is known to be out of reach, at the latest after ``timeout_s``."""
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(node.wait_reported() for node in fleet))
    except TimeoutError:
        pass  # the report then shows the nodes that have answered by now


async def wait_any_usable(
    fleet: Fleet, dispatcher: Dispatcher, changes: ChangeNotifier, demands: Sequence[Demand], *, timeout_s: float
) -> str:
    """Waits until a node can serve one of these demands, of which the first is preferred, and returns the node's name.
    Raises the error of ``wait_usable`` for the first."""
    first_error: NoNodeError | None = None
    for demand in demands:
        try:
            return await wait_usable(fleet, dispatcher, changes, demand, timeout_s=timeout_s)
        except NoNodeError as error:  # also ModelMissing
            first_error = first_error or error
    assert first_error is not None, "there is at least one demand"
    raise first_error


async def wait_usable(
    fleet: Fleet, dispatcher: Dispatcher, changes: ChangeNotifier, demand: Demand, *, timeout_s: float
) -> str:
    """Waits until a node can serve this demand, and returns the node's name.

    Raises NoNodeError or ModelMissing as soon as it is known that no node will, or after ``timeout_s``. If a node that
    could serve the demand was lost only a moment ago, waits up to ``GRACE_S`` for this node, as a request in the queue
    does.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    try:
        async with asyncio.timeout_at(deadline) as scope:
            async for _ in changes.watch():
                name = dispatcher.find_node(demand)
                if name is not None:
                    return name
                allowed_nodes = [node for node in fleet if allows_node(demand, node.name)]
                if not all(node.reported for node in allowed_nodes):
                    continue  # a node that was not probed yet may be able to serve it
                if not dispatcher.is_worth_waiting(demand):
                    raise fleet.explain_no_node(demand)
                deadline = min(deadline, loop.time() + GRACE_S)  # later iterations cannot make it later
                scope.reschedule(deadline)
    except TimeoutError:
        pass  # the error below gives the reason of each node, and does not say only that time is over
    raise fleet.explain_no_node(demand)
