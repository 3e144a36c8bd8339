"""Watches one worker's connection until its end: lost, not made in time, or a host that does not answer pings.

``follow_connection`` returns the cause of the end. The supervisor decides what happens next.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from gpumesh.event_loop.cancellation import raise_if_cancelled
from gpumesh.topology import SshSpec
from gpumesh.tunnels.lifecycle import Cause
from gpumesh.tunnels.workers.worker_link import WorkerLink

NOTICE_S = 4.5  # a dead host is noticed within this time; later only if the keepalive interval is above 3 s
MIN_PING_TIMEOUT_S = 1.5  # long enough that one or two lost packets do not end a connection that works
RTT_WEIGHT = 0.3  # weight of the newest round trip in the moving average that a user sees


class _LinkOver(Exception):
    """Raised to end the task group of a link that is over. Never leaves this file."""


async def follow_connection(
    link: WorkerLink,
    ssh: SshSpec,
    *,
    node: str,
    give_up: asyncio.Event,
    check_requested: asyncio.Event,
    on_rtt_ms: Callable[[float], None],
) -> Cause | None:
    """Waits until the connection is over, and returns the cause; ``None``: ``give_up`` was set first.

    Also receives the worker's messages, and calls ``on_rtt_ms`` with each smoothed round trip. ``check_requested``
    makes the next ping come at once.
    """

    async def watch_link() -> None:
        """Waits for the connection, then measures its round trips."""
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
            group.create_task(watch_link())
            give_up_task = group.create_task(give_up.wait())
            ends: list[asyncio.Future[Any]] = [link.end_cause, give_up_task]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            cause = link.end_cause.result() if link.end_cause.done() else None
            # This cancels the group's tasks, also a task that waits for a person's answer, but not our own task.
            raise _LinkOver
    except* _LinkOver:  # the group has ended, as intended
        pass
    finally:
        # Ends the link's pings and commands, also after ``give_up`` or a cancel. An earlier cause stays.
        link.finish(Cause("tunnel-lost", "the tunnel is closing"))
    raise_if_cancelled()  # the task group may have swallowed a cancellation
    return cause


async def wait_connected(link: WorkerLink, ssh: SshSpec, *, node: str) -> bool:
    """Returns true when the worker is connected. After too long a time, finishes the link and returns false.

    The worker itself enforces ``connect_timeout_s``. The limit here is more than twice as long, and longer with jump
    hosts: it is for a worker that hangs. While a person is being asked a question, the time does not count.
    """
    limit_s = ssh.connect_timeout_s * (2 + len(ssh.proxy_jump)) + 10.0
    spent_s = 0.0
    while spent_s < limit_s:
        try:
            async with asyncio.timeout(1.0):
                await link.connected.wait()
                return True
        except TimeoutError:
            if not link.open_prompts:
                spent_s += 1.0
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
    """Pings the host every ``interval_s``, and at once when ``check_requested`` is set, until a ping gets no answer.

    ``on_rtt_ms`` is called with the smoothed round trip. A ping without an answer finishes the link.
    """
    timeout_s = max(MIN_PING_TIMEOUT_S, NOTICE_S - interval_s)
    smoothed_ms: float | None = None
    check_requested.set()  # ping at once: the worker measured its first round trip while it was busy with the connect
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
