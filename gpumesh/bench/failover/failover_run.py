"""Runs the stage of ``failover``: watches the nodes meanwhile, and finds out afterwards whether all is as before."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from gpumesh.bench.failover.asked_again import check_texts
from gpumesh.bench.failover.node_watch import NodeWatch, watch_nodes
from gpumesh.bench.failover.outage_disturbance import OutageDisturbance
from gpumesh.bench.figures.outages.failover import FailoverFigures, OutageTimes, failover_figures
from gpumesh.bench.load.samples import StageRun
from gpumesh.bench.load.send_prompt import SendPrompt
from gpumesh.errors import GPUMeshError
from gpumesh.state import MeshState

RETURN_TIMEOUT_S = 120.0  # for the node to serve again after the stage: a server may have to load its model


class FailoverTarget(Protocol):
    """The measured mesh, as far as a failover needs it."""

    def send(self) -> SendPrompt: ...

    def watch(self, interval_s: float) -> AsyncIterator[MeshState]: ...


@dataclass(frozen=True, slots=True)
class FailoverRun:
    """A disturbed stage and its figures; ``None`` if it ended before the outage began."""

    run: StageRun
    figures: FailoverFigures | None


async def run_failover(
    target: FailoverTarget,
    disturbance: OutageDisturbance,
    run_stage: Callable[[], Awaitable[StageRun]],
    *,
    return_timeout_s: float = RETURN_TIMEOUT_S,
) -> FailoverRun:
    """Runs the stage, waits until the node serves again, and asks for the answers that were continued once more."""
    async with watch_nodes(target.watch) as watch:
        run = await run_stage()
        times = disturbance.times
        if times is None:
            return FailoverRun(run, None)
        await _wait_back(target.send(), run, times, watch, return_timeout_s)
    text_check = await check_texts(target.send(), run, times)
    return FailoverRun(run, failover_figures(run, times, watch.changes, text_check))


async def _wait_back(
    send: SendPrompt, run: StageRun, times: OutageTimes, watch: NodeWatch, return_timeout_s: float
) -> None:
    """Notes when the node has served again. If no request of the stage went there any more, one is sent."""
    released_s = times.released_s
    if released_s is None or not await watch.wait_serving(times.node, return_timeout_s):
        return
    for change in watch.changes:
        if change.node == times.node and change.at_s >= released_s and change.health.is_serving:
            times.healthy_s = change.at_s
            break
    arrivals_s = [
        run.start_s + record.arrivals_s[0]
        for record in run.records
        if record.arrivals_s and record.first_node == times.node and run.start_s + record.sent_s >= released_s
    ]
    times.served_s = min(arrivals_s, default=None)
    if times.served_s is None:
        try:
            async with send(run.stage.requests[0].chat, times.node) as answer:
                async for chunk in answer:
                    if chunk.text or chunk.thinking:
                        times.served_s = time.perf_counter()
                        break
        except GPUMeshError:  # it does not serve: then no time is known
            pass
