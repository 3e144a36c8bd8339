"""Notices that the machine slept or that its network changed, so that tunnels are checked at once.

Both reports are hints. A false hint costs one ping to each host. A missed hint costs some seconds until a dead tunnel
is noticed.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Callable

TICK_S = 1.0  # time between two checks whether the machine slept
MIN_SLEEP_S = 5.0  # a shorter sleep, or an event loop that is busy for less than this, does not count

# linux/rtnetlink.h: RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_IFADDR
_NETLINK_GROUPS = 0x1 | 0x10 | 0x40 | 0x100


def total_sleep_s() -> float:
    """Seconds that this machine slept since it started, plus a constant. Only differences have a meaning.

    Linux's monotonic clock stops during sleep, and its boot clock does not. On other systems the wall clock takes the
    place of the boot clock. A change of the wall clock then looks like a sleep, which does no harm.
    """
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    return time.time() - time.monotonic()


async def watch_sleep(
    on_wake: Callable[[], None],
    *,
    slept: Callable[[], float] = total_sleep_s,
    clock: Callable[[], float] = time.monotonic,
    tick_s: float = TICK_S,
) -> None:
    """Calls ``on_wake`` after the machine slept, or this process was stopped, for more than ``MIN_SLEEP_S``.

    ``slept`` returns seconds as ``total_sleep_s`` does, ``clock`` monotonic seconds. Never returns.
    """
    last_slept_s, last_tick_at = slept(), clock()
    while True:
        await asyncio.sleep(tick_s)
        slept_s, now = slept(), clock()
        machine_slept = slept_s - last_slept_s > MIN_SLEEP_S
        process_was_stopped = now - last_tick_at > tick_s + MIN_SLEEP_S
        if machine_slept or process_was_stopped:
            on_wake()
        last_slept_s, last_tick_at = slept_s, now


async def watch_network(on_change: Callable[[], None]) -> None:
    """Calls ``on_change`` when the kernel reports a changed link, address or route. Never returns.

    Linux (netlink), macOS and the BSDs (a routing socket) report changes. On other systems, and in a sandbox that
    forbids such sockets, ``on_change`` is never called.
    """
    try:
        events = _open_kernel_events()
    except OSError:  # a sandbox forbids it
        events = None
    if events is None:
        await asyncio.get_running_loop().create_future()  # waits for ever: nobody sets a result
        return
    with events:
        loop = asyncio.get_running_loop()
        while True:
            readable: asyncio.Future[None] = loop.create_future()
            loop.add_reader(events, _set_result_once, readable)
            try:
                await readable
            finally:
                loop.remove_reader(events)
            _drain(events)
            on_change()


def _open_kernel_events() -> socket.socket | None:
    """Opens a socket that is readable after a change of the network; ``None``: the system has no such socket. Raises
    OSError."""
    if sys.platform == "linux":
        events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            events.bind((0, _NETLINK_GROUPS))
        except OSError:
            events.close()
            raise
    elif hasattr(socket, "AF_ROUTE"):
        events = socket.socket(socket.AF_ROUTE, socket.SOCK_RAW)
    else:
        return None
    events.setblocking(False)
    return events


def _set_result_once(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)


def _drain(events: socket.socket) -> None:
    """Reads all events and drops them: it does not matter what has changed."""
    while True:
        try:
            events.recv(65536)
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: events were lost, which is a change too
            continue
