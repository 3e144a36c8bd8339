"""Watches one worker's connection until it ends. A connection ends if it is not made in time, or if the host stops
answering pings.

The result is the cause of the end. The supervisor decides what happens next.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from gpumesh.cancellation import raise_if_cancelled
from gpumesh.topology import SshSpec
from gpumesh.tunnels.lifecycle import Cause
from gpumesh.tunnels.workers.worker_link import WorkerLink

NOTICE_S = 4.5  # within which a dead host is noticed; it takes longer only if the keepalive interval is above 3 s
MIN_PING_TIMEOUT_S = 1.5  # long enough that one or two lost packets do not end a connection that works
RTT_WEIGHT = 0.3  # weight of the newest round trip in the average that is shown


class _LinkOver(Exception):
    """Not an error: ends the task group of a link that is over."""


async def follow_connection(
    link: WorkerLink,
    ssh: SshSpec,
    *,
    node: str,
    give_up: asyncio.Event,
    check_requested: asyncio.Event,
    on_rtt_ms: Callable[[float], None],
) -> Cause | None:
    """Waits until the connection is over, and returns the cause. ``None``: ``give_up`` was set first."""

    async def watch() -> None:
        if await wait_connected(link, ssh, node=node):
            await watch_round_trips(
                link,
                node=node,
                interval_s=ssh.keepalive_s,
                check_requested=check_requested,
                on_rtt_ms=on_rtt_ms,
            )

    cause: Cause | None = None
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(link.receive_messages(group))
            group.create_task(watch())
            give_up_task = group.create_task(give_up.wait())
            ends: list[asyncio.Future[Any]] = [link.end_cause, give_up_task]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            cause = link.end_cause.result() if link.end_cause.done() else None
            # This ends the group's tasks, also those with an open question to a person, without cancelling our own
            # task.
            raise _LinkOver
    except* _LinkOver:
        pass
    finally:
        link.finish(Cause("tunnel-lost", "the tunnel is closing"))
    raise_if_cancelled()
    return cause


async def wait_connected(link: WorkerLink, ssh: SshSpec, *, node: str) -> bool:
    """True when the worker is connected. False when that took too long; then this has finished the link.

    The worker itself keeps ``connect_timeout_s`` for each step. The longer limit here is for a worker that hangs. While
    a person is being asked a question, the time does not count.
    """
    limit_s = ssh.connect_timeout_s * (2 + len(ssh.proxy_jump)) + 10.0
    spent_s = 0.0
    while spent_s < limit_s:
        try:
            async with asyncio.timeout(1.0):
                await link.connected.wait()
                return True
        except TimeoutError:
            spent_s += 0.0 if link.open_prompts else 1.0
    link.finish(Cause("connect-timeout", f"no connection to {node} within {limit_s:.0f} s"))
    return False


async def watch_round_trips(
    link: WorkerLink,
    *,
    node: str,
    interval_s: float,
    check_requested: asyncio.Event,
    on_rtt_ms: Callable[[float], None],
) -> None:
    """Pings the host every ``interval_s``, and at once when ``check_requested`` is set. ``on_rtt_ms`` is called with
    the smoothed round trip. When the host does not answer, this finishes the link and returns."""
    timeout_s = max(MIN_PING_TIMEOUT_S, NOTICE_S - interval_s)
    smoothed_ms: float | None = None
    # Ping at once: the worker's own first measurement was slowed down by the making of the connection.
    check_requested.set()
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(interval_s):
                await check_requested.wait()
        check_requested.clear()
        rtt_ms = await link.ping(timeout_s)
        if rtt_ms is None:
            message = f"{node} has not answered for {timeout_s:.1f} s"
            link.finish(Cause("tunnel-lost", message, "the host, its network or yours is away; it is tried again"))
            return
        smoothed_ms = rtt_ms if smoothed_ms is None else smoothed_ms + RTT_WEIGHT * (rtt_ms - smoothed_ms)
        on_rtt_ms(round(smoothed_ms, 3))
